"""ResNets between torchvision and transformers: for an export, and for folders that transformers wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import ResNetConfig, ResNetForImageClassification

from tltrain.core import untrusted
from tltrain.core.errors import UserError
from tltrain.models import hf_hub
from tltrain.models.metadata import WeightsMetadata, checked
from tltrain.models.weight_files import reading, twins
from tltrain.models.weight_files.containers import state_dict_in

_SHAPES = {
    ("basic", (2, 2, 2, 2)): "resnet18", ("basic", (3, 4, 6, 3)): "resnet34", ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101", ("bottleneck", (3, 8, 36, 3)): "resnet152",
}  # fmt: skip
_WIDTHS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}
_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"
_FILES = ("model.safetensors", "pytorch_model.bin")


def converted(net: ResNet) -> ResNetForImageClassification:
    """A transformers model with the weights of a torchvision ResNet-18 to ResNet-152, in eval mode."""
    kind = "basic" if isinstance(net.layer1[0], BasicBlock) else "bottleneck"
    depths = [len(layer) for layer in (net.layer1, net.layer2, net.layer3, net.layer4)]
    config = ResNetConfig(hidden_sizes=_WIDTHS[kind], depths=depths, layer_type=kind)
    config.num_labels = net.fc.out_features
    model = ResNetForImageClassification(config).eval()
    twin = twins.converted(net.state_dict(), model.state_dict())
    assert twin is not None, "torchvision's names are known"
    model.load_state_dict(twin.state, strict=True)
    return model


def name_of(folder: Path) -> str | None:
    """torchvision's name for the ResNet in a save_pretrained folder. None where torchvision has none like it. Raises UserError."""
    raw = untrusted.read_json(folder / _CONFIG)
    if not isinstance(raw, dict) or raw.get("model_type") != "resnet":
        return None
    config = {**ResNetConfig().to_dict(), **raw}
    kind, depths = config["layer_type"], config["depths"]
    plain = (
        config["hidden_sizes"] == _WIDTHS.get(kind if isinstance(kind, str) else "")
        and (config["embedding_size"], config["num_channels"], config["hidden_act"]) == (64, 3, "relu")
        and not config["downsample_in_first_stage"]
        and not config["downsample_in_bottleneck"]
        and isinstance(depths, list)
    )
    return _SHAPES.get((kind, tuple(depths))) if plain and all(isinstance(depth, int) for depth in depths) else None


def read_card(folder: Path, card: WeightsMetadata) -> tuple[WeightsMetadata, tuple[str, ...]]:
    """The metadata of the folder, and lines for the user on values that were assumed. card: of its network. Raises UserError."""
    raw: Any = untrusted.read_json(folder / _CONFIG)
    labels: Any = raw.get("id2label")
    if isinstance(labels, dict):
        names: Any = tuple(labels.get(str(i)) for i in range(len(labels)))
        card = replace(card, classes=names)
    if not (folder / _PROCESSOR).is_file():
        return checked(card, str(folder / _CONFIG)), (f"it has no {_PROCESSOR}: size, mean and std are assumed from the name {card.name}",)
    return checked(hf_hub.with_processor(card, folder), str(folder / _PROCESSOR)), ()


def read_state(folder: Path, body: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the folder under torchvision's names, without a head where it has none. body: torchvision's. Raises UserError."""
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has {_CONFIG} of a ResNet, and none of {', '.join(_FILES)}")
    state, _ = state_dict_in(reading.read(path)[0], path)
    twin = twins.converted(state, [name for name in body if not name.startswith("fc.")])
    if twin is None:
        raise UserError(f"weights {path} do not have the tensors of the ResNet that {_CONFIG} beside it describes; get them anew")
    return twin.state
