"""Weights of somebody else whose metadata or configuration is forged: one message each, before anything is built or loaded."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from backbone_files import CLASSES, load, ours, vit_net
from safetensors.torch import save_file

from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone
from tltrain.models import factory

MILLION = 1_000_000
NO_NUMBERS: tuple[Any, ...] = ([0, 0, 0], [1, 1], [-1, 1, 1], ["1", "1", "1"], 1, None, [True] * 3)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        *(("std", value, "three numbers above 0") for value in NO_NUMBERS),
        *(("mean", value, "three finite numbers") for value in ([0.5], 0.5, None, ["a", "b", "c"], [float("nan")] * 3)),
        *(("size", value, "whole number of pixels") for value in (0, -3, MILLION, 32.5, True, "32", None)),
        ("resize", MILLION, "whole number of pixels"),
        *(("interpolation", value, "bilinear or bicubic") for value in ("nearest", 3, None, ["bilinear"])),
        *(("classes", value, "a list of names") for value in ("ab", [1, 2], {"a": 1}, 3)),
        *(("temperature", value, "a number above 0") for value in (0, -1, "x", None, float("inf"))),
        *(("config", value, "a mapping") for value in (3, ["a"], None)),
        *(("name", value, "the name of a network") for value in (3, "", None)),
    ],
)
def test_a_forged_value_is_one_message(key: str, value: Any, rule: str, tmp_path: Path) -> None:
    loaded = ours(tmp_path / "w.safetensors")
    _write(tmp_path / "w.safetensors", loaded, json.dumps({**asdict(loaded.card), key: value}))
    with pytest.raises(UserError, match=rule) as caught:
        factory.read_card(tmp_path / "w.safetensors")
    assert f"says that {key} is" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "3", "null", '"x"'])
def test_metadata_that_is_no_mapping_is_one_message(text: str, tmp_path: Path) -> None:
    loaded = ours(tmp_path / "w.safetensors")
    _write(tmp_path / "w.safetensors", loaded, text)
    with pytest.raises(UserError, match=r"the card in .*w\.safetensors is "):
        factory.read_card(tmp_path / "w.safetensors")


CONFIGS = [
    ({"auto_map": {"AutoConfig": "evil.Config"}}, "never run here"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantised weights"),
    ({"quantization_config": {"quant_method": "unheard of"}}, "quantised weights"),
    ({"attn_implementation": "flash_attention_2"}, "no kernels are fetched"),
    ({"attn_implementation": "somebody/kernel"}, "no kernels are fetched"),
    ({"_attn_implementation": "somebody/kernel"}, "no kernels are fetched"),
    *(
        ({key: MILLION}, f"{key} 1000000")
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "image_size")
    ),
    ({"patch_size": 0}, "patch_size 0"),
    ({"patch_size": [8, 8]}, "only squares"),
    ({"num_attention_heads": 0}, "num_attention_heads 0"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"hidden_act": "unheard of"}, "no ViT|cannot be loaded"),
    ({"layer_norm_eps": "small"}, "no ViT|cannot be loaded"),
    ({"dtype": "float99"}, "no ViT|cannot be loaded"),
    ({"hidden_dropout_prob": 5}, "no ViT|cannot be loaded"),
]


@pytest.mark.parametrize("place", ["folder", "metadata"])
@pytest.mark.parametrize(("forged", "message"), CONFIGS, ids=[str(forged)[:40] for forged, _ in CONFIGS])
def test_a_forged_configuration_is_one_message_in_time(forged: dict[str, Any], message: str, place: str, tmp_path: Path) -> None:
    if place == "folder":
        weights = tmp_path / "net"
        vit_net().save_pretrained(weights)
        config = json.loads((weights / "config.json").read_text())
        (weights / "config.json").write_text(json.dumps({**config, **forged}))
    else:
        weights = tmp_path / "w.safetensors"
        loaded = ours(weights, "vit-tiny")
        _write(weights, loaded, json.dumps({**asdict(loaded.card), "config": {**loaded.card.config, **forged}}))
    began = time.process_time()
    with pytest.raises(UserError, match=message):
        load(None, weights)
    with pytest.raises(UserError, match=message):
        factory.skeleton(Backbone(weights=str(weights)), len(CLASSES), None, None)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("left", ["patch_size", "image_size", "hidden_size"])
def test_a_configuration_that_lacks_its_sizes_is_named(left: str, tmp_path: Path) -> None:
    loaded = ours(tmp_path / "w.safetensors", "vit-tiny")
    config = {key: value for key, value in loaded.card.config.items() if key != left}
    _write(tmp_path / "w.safetensors", loaded, json.dumps({**asdict(loaded.card), "config": config}))
    with pytest.raises(UserError, match=left):
        load(None, tmp_path / "w.safetensors")


def _write(path: Path, loaded: factory.Loaded, text: str) -> None:
    save_file(loaded.chain.net.state_dict(), path, metadata={"format": "pt", "tltrain": text})
