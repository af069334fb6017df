"""Reads torchvision's pretrained weights, from torch's hub cache or by download."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights

from tltrain.core.errors import UserError
from tltrain.core.files import downloading
from tltrain.models.metadata import WeightsMetadata
from tltrain.models.weight_files.download import fetch

AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
"""Networks with classifiers that serve training from random weights alone, and the beginnings of the names of their tensors."""


def options(name: str, size: int | None) -> dict[str, Any]:
    """The arguments of `get_model`, beside the number of classes, with which a network is built here."""
    if name in AUXILIARY:
        return {"aux_logits": False, "init_weights": False}
    if size is not None and name.startswith("vit_"):
        return {"image_size": size}
    return {"input_size": (size, size)} if size is not None and name == "maxvit_t" else {}


def build(name: str, num_classes: int, size: int | None) -> nn.Module:
    """torchvision's network with random weights on the default device. Raises ValueError for a size that it cannot be built for."""
    given = {"weights": None, "num_classes": num_classes, **options(name, size)}
    if name.startswith("regnet") and torch.get_default_device().type == "meta":  # its builder computes widths with tensors
        from accelerate import init_empty_weights

        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            net: nn.Module = get_model(name, **given)
        return net.to("meta")
    net = get_model(name, **given)
    return net


def line(name: str) -> str:
    """One line about a network and its weights."""
    weights = get_model_weights(name)
    entry = weights["DEFAULT"]
    best = entry.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    size = entry.transforms().crop_size[0]
    known = ", ".join(weights.__members__)
    return f"{entry.meta['num_params'] / 1e6:.1f} M parameters, {size} px, {best:.1f} % on ImageNet; weights: {known}"


def renamed(state: Mapping[str, Tensor], pattern: str, replacement: str) -> dict[str, Tensor]:
    return {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}


def find(name: str, weights: str) -> WeightsEnum:
    """torchvision's WeightsEnum member for the names of a model and its weights. Raises UserError."""
    known = get_model_weights(name)
    if weights not in known.__members__:
        raise UserError(
            f"backbone.weights is {weights!r}, which is no weights name of {name} (it has {', '.join(known.__members__)}), "
            "and no file or folder of that path exists"
        )
    return cast(WeightsEnum, known[weights])


def card_of(card: WeightsMetadata, entry: WeightsEnum) -> WeightsMetadata:
    """Metadata with the preprocessing and classes of torchvision's weights. `card` supplies the rest."""
    preset = entry.transforms()
    return replace(
        card,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        size=preset.crop_size[0],
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        classes=tuple(entry.meta["categories"]),
    )


def read_state(entry: WeightsEnum) -> dict[str, Tensor]:
    """Read the tensors to the CPU. Raises UserError where the file cannot be downloaded or read."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name
    there = f"download {entry.url} elsewhere and put it at {path}"
    try:
        if not path.exists():
            if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
                raise UserError(f"{entry} is not in torch's cache, and HF_HUB_OFFLINE is set: nothing is downloaded; {there}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with downloading(Path(f"{path}.lock"), f"downloads {path.name}"):  # the others wait, and read its file
                if not path.exists():
                    fetch(entry.url, path, next(iter(re.findall(r"-([a-f0-9]+)\.", path.name)), ""))  # as torch's hub names its files
        return _read(entry)
    except OSError as error:
        raise UserError(f"{entry} cannot be fetched ({error}); {there}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no whole weights file ({str(error).splitlines()[0]}); delete it, and it is downloaded anew") from error


def _read(entry: WeightsEnum) -> dict[str, Tensor]:
    return entry.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
