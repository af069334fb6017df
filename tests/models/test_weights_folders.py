"""Folders written by transformers' save_pretrained, and the interpolation of position embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_files import SMALL, assert_head_is_zero, assert_same, config, images, load, vit_net
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForMaskedImageModeling, ViTImageProcessor, ViTModel

from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone
from tltrain.models import factory


def test_a_folder_with_a_head(tmp_path: Path) -> None:
    net = vit_net()
    net.save_pretrained(tmp_path)
    loaded = load(None, tmp_path, classes=("x", "y"))
    assert_same(dict(loaded.chain.net.state_dict()), dict(net.state_dict()), but="classifier.")
    assert_head_is_zero(loaded, 2)
    assert "their head for 3 classes left out" in loaded.origin
    assert loaded.card.config["id2label"] == {"0": "x", "1": "y"}
    kept = load("vit", tmp_path, head="keep")
    pixels = kept.chain.normalise(images())
    assert torch.equal(kept.chain(images()), net(pixels).logits)
    with pytest.raises(UserError, match=r"the data lacks \(1\): cat; the weights lack \(1\): dog"):
        load(None, tmp_path, head="keep", classes=("ant", "bee", "dog"))
    with pytest.raises(UserError, match="another order: ant, bee, cat against bee, ant, cat"):
        load(None, tmp_path, head="keep", classes=("bee", "ant", "cat"))


def test_a_folder_of_vit_model(tmp_path: Path) -> None:
    """As the in21k repository: no `vit.` in front, a pooler, no head."""
    net = ViTModel(config())
    net.save_pretrained(tmp_path)
    assert {"embeddings.cls_token", "pooler.dense.weight"} < set(load_file(tmp_path / "model.safetensors"))
    loaded = load(None, tmp_path)
    got = {n.removeprefix("vit."): t for n, t in loaded.chain.net.state_dict().items() if not n.startswith("classifier")}
    assert_same(got, {n: t for n, t in net.state_dict().items() if not n.startswith("pooler")}, but="-")
    assert_head_is_zero(loaded, 3)
    assert "they have no head" in loaded.origin
    with pytest.raises(UserError, match="have no head, and one for 3 classes is needed"):
        load(None, tmp_path, head="keep")


def test_the_preprocessor_says_mean_std_size(tmp_path: Path) -> None:
    vit_net().save_pretrained(tmp_path)
    assert "no preprocessor_config.json: mean and std are 0.5" in load(None, tmp_path).origin
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size={"height": 32, "width": 32}, resample=3).save_pretrained(
        tmp_path
    )
    for loaded in (load(None, tmp_path), factory.skeleton(Backbone(weights=str(tmp_path)), 3, None, None)):
        assert (loaded.chain.mean, loaded.chain.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert (loaded.preprocess.size, loaded.preprocess.resize, loaded.preprocess.interpolation) == (32, 32, "bicubic")
        assert "preprocessor_config" not in loaded.origin


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"size": 40}, (40, 40)),  # how older files say a square
        ({"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, (32, 36)),
        ({"do_normalize": False}, (32, 32)),
    ],
)
def test_other_preprocessors(tmp_path: Path, changes: dict[str, Any], want: tuple[int, int]) -> None:
    vit_net().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    loaded = load(None, tmp_path)
    assert (loaded.preprocess.size, loaded.preprocess.resize) == want
    assert loaded.chain.std == ((1.0, 1.0, 1.0) if "do_normalize" in changes else (0.5, 0.5, 0.5))


@pytest.mark.parametrize("changes", [{"resample": 0}, {"size": {"height": 32, "width": 40}}, {"size": {"shortest_edge": 32}}])
def test_a_preprocessor_that_cannot_be_followed_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    vit_net().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=r"preprocessor_config\.json asks for"):
        load(None, tmp_path)


def test_a_half_precision_folder_is_read_in_fp32(tmp_path: Path) -> None:
    net: Any = vit_net()
    net.to(torch.bfloat16)
    net.save_pretrained(tmp_path)
    loaded = load(None, tmp_path)
    assert {p.dtype for p in loaded.chain.parameters()} == {torch.float32}
    assert_same(dict(loaded.chain.net.state_dict()), dict(net.float().state_dict()), but="classifier.")


@pytest.mark.parametrize("drop", ["encoder.layer.1.layernorm_before.weight", "embeddings.position_embeddings", "layernorm.bias"])
def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path: Path, drop: str) -> None:
    vit_net().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[f"vit.{drop}"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing \(1\): vit\." + drop.replace("encoder.layer", "layers").replace(".", r"\.")):
        load(None, tmp_path)


def test_a_folder_with_other_shapes_or_more_tensors_is_refused(tmp_path: Path) -> None:
    vit_net().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "image_size": 40}))
    with pytest.raises(
        UserError, match=r"of another shape \(1\): vit\.embeddings\.position_embeddings is \(1, 17, 24\), not \(1, 26, 24\)"
    ):
        load(None, tmp_path)
    path.write_text(json.dumps({**good, "num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"unexpected \(16\): .*layer.*\.1\..* and 10 more"):
        load(None, tmp_path)
    path.write_text(json.dumps({**good, "model_type": "deit"}))
    with pytest.raises(UserError, match=r"do not fit the network that their configuration describes: missing \(\d+\): deit\."):
        load(None, tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"config\.json is no JSON"):
        load(None, tmp_path)


def test_a_masked_image_model_is_refused_by_name(tmp_path: Path) -> None:
    ViTForMaskedImageModeling(ViTConfig(image_size=32, encoder_stride=8, **SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"unexpected \(3\): decoder\.0\.bias, decoder\.0\.weight, vit\.embeddings\.mask_token"):
        load(None, tmp_path)


def test_the_name_must_be_what_the_weights_are(tmp_path: Path) -> None:
    vit_net().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"have hidden_size 24, not 768, num_hidden_layers 2, not 12.* set the name to vit or null"):
        load("vit-b16", tmp_path)
    with pytest.raises(UserError, match=r"backbone\.name is resnet-tiny, and the weights .* are a vit"):
        load("resnet-tiny", tmp_path)


@pytest.mark.parametrize("size", [16, 24, 40, 64])
def test_positions_are_interpolated_as_transformers_does(tmp_path: Path, size: int) -> None:
    net = vit_net(32)
    net.save_pretrained(tmp_path)
    loaded = load(None, tmp_path, head="keep", size=size)
    assert f"position embeddings interpolated from 32 to {size} px" in loaded.origin
    assert (loaded.card.size, loaded.card.config["image_size"]) == (size, size)
    embeddings = net.vit.embeddings
    want = embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + (size // 8) ** 2, 24), size, size)
    got = loaded.chain.net.state_dict()["vit.embeddings.position_embeddings"]
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert torch.equal(got[:, 0], embeddings.position_embeddings[:, 0])
    pixels = loaded.chain.normalise(images(size))
    torch.testing.assert_close(loaded.chain(images(size)), net(pixels, interpolate_pos_encoding=True).logits, atol=1e-5, rtol=1e-5)
    factory.write_weights(tmp_path / "w.safetensors", loaded.chain.net.state_dict(), loaded.card)
    again = load(None, tmp_path / "w.safetensors", head="keep")
    assert torch.equal(again.chain(images(size)), loaded.chain(images(size)))


def test_a_size_that_the_patch_does_not_divide_is_refused(tmp_path: Path) -> None:
    vit_net().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"data\.size is 36, which the patch of vit, 8 pixels, does not divide; take 32 or 40"):
        load(None, tmp_path, size=36)
