"""Reads torchvision's pretrained weights, from torch's hub cache or by download."""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import cast
from urllib.parse import urlparse

import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights

from tltrain.core.errors import UserError
from tltrain.core.files import downloading
from tltrain.models.metadata import WeightsMetadata


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
                return _read(entry)
        return _read(entry)
    except OSError as error:
        raise UserError(f"{entry} cannot be fetched ({error}); {there}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no whole weights file ({str(error).splitlines()[0]}); delete it, and it is downloaded anew") from error


def _read(entry: WeightsEnum) -> dict[str, Tensor]:
    return entry.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
