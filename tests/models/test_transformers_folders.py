"""Weights and processors of transformers' networks, from folders and from the hub's cache, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import slow
from hf_nets import CLASSES, config_of, net_of, random_weights, saved
from safetensors.torch import load_file, save_file
from torch import Tensor

from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone
from tltrain.models import factory
from tltrain.models.families.vit import interpolate_positions


def load(weights: Path, name: str | None = None, **settings: Any) -> factory.Loaded:
    defaults = {"classes": CLASSES, "size": None, "resize": None, "head": "new", "seed": 0}
    return factory.load(Backbone(name=name, weights=str(weights)), **{**defaults, **settings})


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


BARE: list[Any] = [
    ("dinov2", "Dinov2Model", "they have no head"),
    slow("dinov2", "Dinov2Backbone", "they have no head"),
    slow("beit", "BeitForMaskedImageModeling", "left out: layernorm, lm_head; new, as transformers begins them: beit.pooler.layernorm"),
    ("deit", "DeiTForImageClassificationWithTeacher", "left out: cls_classifier, distillation_classifier"),
    slow("clip", "CLIPModel", "left out: logit_scale, text_model, text_projection, visual_projection"),
    ("poolformer", "PoolFormerModel", "new, as transformers begins them: norm"),
    slow("swin", "SwinForMaskedImageModeling", "left out: decoder"),
]


@pytest.mark.parametrize(("name", "kind", "said"), BARE)
def test_a_checkpoint_without_a_classifier_gets_a_new_head(name: str, kind: str, said: str, tmp_path: Path) -> None:
    net: Any = random_weights(getattr(transformers, kind)(config_of(name)))
    loaded = load(saved(net, tmp_path))
    assert said in loaded.origin
    assert "they have no head" in loaded.origin
    own = loaded.chain.net.state_dict()
    assert not own[f"{loaded.family.head_of(loaded.card)}.weight"].any()
    theirs = [tensor for name, tensor in net.state_dict().items() if ".mlp." in name or "intermediate" in name or "block" in name]
    kept = {tuple(t.flatten()[:4].tolist()) for t in own.values()}
    visual = [t for n, t in net.state_dict().items() if not n.startswith(("text_model", "decoder"))]
    assert theirs
    assert sum(tuple(t.flatten()[:4].tolist()) in kept for t in visual) > 0.8 * len(visual)


def test_a_masked_autoencoder_is_a_vit(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, patch_size=8, image_size=32,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    loaded = load(saved(random_weights(transformers.ViTMAEForPreTraining(config)), tmp_path))
    assert loaded.card.name == "hf:vit"
    assert "left out: decoder" in loaded.origin


def test_positions_are_interpolated_once(tmp_path: Path) -> None:
    net = net_of(config_of("dinov2"))
    loaded = load(saved(net, tmp_path), size=48, resize=56)
    name = "dinov2.embeddings.position_embeddings"
    assert torch.equal(loaded.chain.net.state_dict()[name], interpolate_positions(net.state_dict()[name], 6))
    assert "position embeddings interpolated from 32 to 48 px" in loaded.origin
    assert (loaded.card.size, loaded.card.resize, loaded.card.config["image_size"]) == (48, 56, 48)
    assert loaded.chain(torch.zeros(1, 3, 48, 48)).shape == (1, 3)


def test_a_table_of_positions_without_a_class_token_and_in_an_embedding(tmp_path: Path) -> None:
    for name, key in (("siglip", "vision_model.embeddings.position_embedding.weight"), ("ijepa", "ijepa.embeddings.position_embeddings")):
        net = net_of(config_of(name))
        loaded = load(saved(net, tmp_path / name), size=48)
        positions = net.state_dict()[key].reshape(1, 16, 32)
        want = interpolate_positions(torch.cat((positions[:, :1], positions), dim=1), 6)[:, 1:]
        assert torch.equal(loaded.chain.net.state_dict()[key].reshape(1, 36, 32), want)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("dinov2", {"auto_map": {"AutoModel": "x.Y"}}, {}, "sets auto_map .*code of its own, which is never run here"),
    ("dinov2", {"quantization_config": {"bits": 4}}, {}, "quantised weights cannot be fine-tuned"),
    ("dinov2", {"attn_implementation": "kernels-community/evil"}, {}, "no kernels are fetched"),
    ("dinov2", {"num_hidden_layers": 10**6}, {}, "num_hidden_layers 1000000; it must be a number up to 512"),
    ("dinov2", {"hidden_size": 10**6, "num_hidden_layers": 500}, {}, "parameters, and at most"),
    ("dinov2", {"hidden_size": "wide"}, {}, "is the configuration of no dinov2"),
    ("dinov2", {"num_channels": 4}, {}, "num_channels 4; images here have 3"),
    ("dinov2", {"model_type": "bert"}, {}, "model_type 'bert', which classifies no images"),
    ("dinov2", {"model_type": "nobody-knows"}, {}, "model_type 'nobody-knows', which transformers .* does not know"),
    ("dinov2", {"model_type": None, "architecture": "resnet18", "pretrained_cfg": {}}, {}, "timm:resnet18"),
    ("dinov2", {"model_type": "vit_msn"}, {}, "do not fit the network that their configuration describes: missing"),
    ("dinov2", {"hidden_size": 64}, {}, "of another shape"),
    ("dinov2", {"num_hidden_layers": 5}, {}, "missing .*encoder.layer.3"),
    ("dinov2", {}, {"size": 36}, "data.size is 36, which the patch of hf:dinov2, 8 pixels, does not divide; take 32 or 40"),
    ("dinov2", {}, {"name": "hf:swin"}, "are a hf:dinov2; set the name to hf:dinov2 or null"),
    ("dinov2", {}, {"name": "vit-b16"}, "are a hf:dinov2; set the name to hf:dinov2 or null"),
    ("dinov2", {}, {"name": "hf:dinov2", "head": "keep", "classes": ("x", "y", "z")}, "the data lacks .3.: ant, bee, cat"),
    ("beit", {}, {"size": 48}, "relative_position_bias_table.* are for images of 32 pixels alone; set data.size to 32 or null"),
]


@pytest.mark.parametrize(("name", "changes", "settings", "message"), REFUSED)
def test_what_cannot_be_used_is_refused_in_one_message(
    name: str, changes: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = edited(saved(net_of(config_of(name)), tmp_path), **changes)
    with pytest.raises(UserError, match=message) as caught:
        load(folder, **settings)
    assert "\n" not in str(caught.value)


def test_a_network_that_takes_the_mean_of_two_classifiers_runs_whole(tmp_path: Path) -> None:
    kind: Any = transformers.SwiftFormerConfig
    config = kind(depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32], image_size=64, num_labels=3)
    net: Any = random_weights(transformers.SwiftFormerForImageClassification(config))
    loaded = load(saved(net, tmp_path))
    assert "it has 2 classifiers, and answers with their mean" in loaded.chain.why_whole
    assert loaded.chain.blocks[-1].owns == ("head", "dist_head")
    own = loaded.chain.net.state_dict()
    assert not own["head.weight"].any()
    assert not own["dist_head.weight"].any()
    kept = load(saved(net, tmp_path), head="keep", classes=("LABEL_0", "LABEL_1", "LABEL_2")).chain
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(kept(x), net(kept.normalise(x)).logits)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = saved(net_of(config_of("dinov2")), tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \.safetensors file"):
        load(folder)


PROCESSORS: list[tuple[str, dict[str, Any], tuple[int, int, str, float, float], str]] = [
    ("ViTImageProcessor", {"size": {"height": 48, "width": 48}}, (48, 48, "bilinear", 0.5, 0.5), "squeezes an image into a square"),
    ("BitImageProcessor", {"size": 256, "crop_size": 224, "image_mean": [0.4] * 3, "image_std": [0.2] * 3},
     (224, 256, "bicubic", 0.4, 0.2), ""),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 256, "bicubic", 0.5, 0.5), ""),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}, (384, 384, "bicubic", 0.5, 0.5), "squeezes"),
    ("LevitImageProcessor", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (224, 256, "bicubic", 0.5, 0.5), ""),
    ("MobileViTImageProcessor", {}, (256, 256, "bicubic", 0.0, 1.0), "swaps red and blue"),
    ("EfficientNetImageProcessor", {"rescale_offset": True, "rescale_factor": 1 / 127.5, "do_normalize": False, "include_top": False,
      "resample": 0}, (346, 346, "bicubic", 0.5, 0.5), "resizes by nearest; here it is bicubic"),
    ("ViTImageProcessor", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, (224, 224, "bilinear", 0.5, 0.2), ""),
    ("ViTImageProcessor", {"size": {"height": 32, "width": 64}}, (32, 32, "bilinear", 0.5, 0.5), "makes no squares"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "want", "said"), PROCESSORS)
def test_preprocessing_is_the_processors(
    kind: str, settings: dict[str, Any], want: tuple[int, int, str, float, float], said: str, tmp_path: Path
) -> None:
    folder = saved(net_of(config_of("resnet", image_size=32)), tmp_path)
    getattr(transformers, kind)(**settings).save_pretrained(folder)
    loaded = load(folder)
    card = loaded.card
    assert (card.size, card.resize, card.interpolation) == want[:3]
    assert card.mean == pytest.approx((want[3],) * 3, abs=1e-5)
    assert card.std == pytest.approx((want[4],) * 3, abs=1e-5)
    assert said in loaded.origin


def test_a_processor_that_runs_code_or_is_none_is_refused(tmp_path: Path) -> None:
    folder = saved(net_of(config_of("resnet")), tmp_path)
    for raw, message in (({"auto_map": {"x": "y"}}, "auto_map"), ([1], "is no processor"), ({"size": "huge"}, "cannot be read")):
        (folder / "preprocessor_config.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match=message):
            load(folder)


_LOAD = """
import sys
from tltrain.core.recipe import Backbone
from tltrain.models import factory
for pair in sys.argv[1:]:
    name, _, weights = pair.partition("=")
    spec = Backbone(name=name or None, weights=weights or None)
    for make in (lambda: factory.skeleton(spec, 3, None, None),
                 lambda: factory.load(spec, classes=("ant", "bee", "cat"), size=None, resize=None, head="new", seed=0)):
        try:
            loaded = make()
            print(loaded.card.name, loaded.card.mean, loaded.card.size, len(loaded.chain.blocks), loaded.chain.runs_whole, loaded.origin)
        except factory.UserError as error:
            print("refused", error)
"""


def _hub(home: Path, repo: str, folder: Path) -> None:
    """A folder as huggingface_hub lays it out in its cache, with the commit named by refs/main."""
    root, commit = home / "hub" / f"models--{repo.replace('/', '--')}", "c0ffee" + "0" * 34
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots").mkdir()
    os.symlink(folder, root / "snapshots" / commit)


def _run(home: Path, *pairs: str) -> list[str]:
    """Two lines for each name=weights: its skeleton, then itself. In a process of its own: huggingface_hub looks at HF_HOME once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "HUGGINGFACE_"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", _LOAD, *pairs], env=environment, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.splitlines()


def test_a_repository_is_read_from_the_hubs_cache(tmp_path: Path) -> None:
    processor = {"size": {"height": 48, "width": 48}, "image_mean": [0.1, 0.2, 0.3]}
    net: Any = net_of(config_of("dinov2"))
    _hub(tmp_path, "org/dino", saved(net, tmp_path / "a", **processor))
    save_file(net.dinov2.state_dict(), tmp_path / "w.safetensors")  # the names of the backbone alone
    files = [f"hf:org/dino={path}" for path in (tmp_path / "a" / "model.safetensors", tmp_path / "w.safetensors")]
    known = ("hf:org/dino=DEFAULT", "hf:org/dino=", "=org/dino")
    said = _run(tmp_path, *known, "hf:org/none=DEFAULT", "hf:org/none=", "=org/none", "hf:dinov2=", *files)
    assert len(said) == 18
    for line in said[:6]:
        assert line.startswith("hf:org/dino (0.1, 0.2, 0.3) 48 5 False "), line
    assert "hub org/dino at revision c0ffee000000" in said[1]
    assert "position embeddings interpolated from 32 to 48 px" in said[1]
    assert "random weights, seed 0" in said[3]
    for line in said[6:12]:
        assert line.startswith("refused weights 'org/none' are neither a folder here nor a hub repository that can be read"), line
        assert "hf download org/none" in line
    assert "takes its configuration from weights" in said[13]
    for line in said[14:]:
        assert line.startswith("hf:org/dino (0.1, 0.2, 0.3) "), line
    assert "their head for 3 classes left out" in said[15]
    assert "they have no head" in said[17]


def test_the_head_may_be_kept(tmp_path: Path) -> None:
    net: Any = net_of(config_of("resnet"))
    state: dict[str, Tensor] = load(saved(net, tmp_path), head="keep").chain.net.state_dict()
    assert torch.equal(state["classifier.1.weight"], net.classifier[1].weight)
    assert torch.equal(state["resnet.embedder.embedder.normalization.running_var"], net.resnet.embedder.embedder.normalization.running_var)
