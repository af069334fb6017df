"""Metadata of weights, stored as JSON in the header of a safetensors file: network, preprocessing and classes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tltrain.core import files, untrusted
from tltrain.core.errors import UserError
from tltrain.core.recipe import MOST_PIXELS
from tltrain.runs import manifest


@dataclass(frozen=True)
class WeightsMetadata:
    """A network's architecture, preprocessing and classes."""

    name: str
    """Name of the network, such as resnet50 or vit-b16 (`family.names()`)."""
    config: dict[str, Any]
    """Values of the ViTConfig of a ViT. Empty for a ResNet, which its name defines."""
    mean: tuple[float, ...]
    """Per channel, of images in [0, 1]."""
    std: tuple[float, ...]
    size: int
    """Side of the square input of the network, pixels."""
    resize: int
    """Shorter side before the crop, pixels."""
    interpolation: Literal["bilinear", "bicubic"]
    classes: tuple[str, ...] | None
    """Names of the head's classes, in order. None where they are unknown."""
    temperature: float = 1.0
    """Divisor of the logits before the softmax, fitted for calibrated probabilities. 1 without calibration."""
    thresholds: tuple[float, ...] | None = None
    """Of several labels an image: the calibrated probability (a sigmoid, not a softmax) from which each class is named. Else None."""


def write_weights(path: str | Path, state: Mapping[str, Tensor], card: WeightsMetadata) -> None:
    """Write a net's state dict with its metadata to a safetensors file.

    The write is atomic, and the file is synced to disk on return.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with files.replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "tltrain": json.dumps(plain(card))})
        files.follow_umask(temporary)
        _order_header(temporary)


def plain(card: WeightsMetadata) -> dict[str, Any]:
    """As JSON. Without the thresholds of several labels where there are none: those weights are the same bytes as ever."""
    return {key: value for key, value in asdict(card).items() if key != "thresholds" or value is not None}


def read_card(path: str | Path) -> WeightsMetadata | None:
    """Read the metadata of a safetensors file. Returns None where another program wrote the file. Raises UserError."""
    try:
        with open(path, "rb"):  # safetensors reports an unreadable file as missing
            pass
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("tltrain")
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path} cannot be read as safetensors: {_reason(error)}") from error
    if text is None:
        return None
    raw = untrusted.parse_json(text, f"the card in {path}")
    if not isinstance(raw, dict):
        raise UserError(f"the card in {path} is {untrusted.cut(raw)}, which is no description of weights; get the file anew")
    known = {field.name for field in fields(WeightsMetadata)}
    needed = {field.name for field in fields(WeightsMetadata) if field.default is MISSING}
    if not needed <= set(raw) <= known:
        differ = ", ".join(sorted((needed - set(raw)) | (set(raw) - known)))
        raise UserError(f"the card in {path} was written by another version of tltrain (it differs in {differ}); use that version")
    lists = {key: tuple(raw[key]) for key in ("mean", "std", "classes", "thresholds") if isinstance(raw.get(key), list)}
    return checked(WeightsMetadata(**{**raw, **lists}), f"the card in {path}")


def checked(card: WeightsMetadata, origin: str) -> WeightsMetadata:
    """Validate metadata, which may come from an untrusted file, and return it. `origin` names it in messages. Raises UserError."""
    for key, (holds, rule) in _RULES.items():
        if not holds(value := getattr(card, key)):
            raise UserError(f"{origin} says that {key} is {untrusted.cut(value)}; it must be {rule}. Get the weights anew, or other ones")
    if card.thresholds is not None and len(card.thresholds) != len(card.classes or ()):
        raise UserError(f"{origin} has {len(card.thresholds)} thresholds for {len(card.classes or ())} classes; get the weights anew")
    return card


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _three(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(_number, value))


def _side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_PIXELS


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda v: isinstance(v, str) and v != "", "the name of a network"),
    "config": (lambda v: isinstance(v, dict), "a mapping"),
    "mean": (_three, "three finite numbers"),
    "std": (lambda v: _three(v) and min(v) > 0, "three numbers above 0"),
    "size": (_side, f"a whole number of pixels up to {MOST_PIXELS}"),
    "resize": (_side, f"a whole number of pixels up to {MOST_PIXELS}"),
    "interpolation": (lambda v: v in ("bilinear", "bicubic"), "bilinear or bicubic"),
    "classes": (lambda v: v is None or (isinstance(v, tuple) and all(isinstance(name, str) for name in v)), "a list of names, or null"),
    "temperature": (lambda v: _number(v) and v > 0, "a number above 0"),
    "thresholds": (lambda v: v is None or (isinstance(v, tuple) and all(map(_number, v))), "a list of numbers, or null"),
}


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file to the CPU. Raises UserError."""
    manifest.check(Path(path))
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path} cannot be read as safetensors: {error}") from error


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _order_header(path: Path) -> None:
    """Sort the metadata in the header. safetensors writes it in random order, and equal weights must give identical files."""
    with path.open("r+b") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(num_bytes))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(num_bytes)
        assert len(ordered) == num_bytes, "the same JSON, in another order"
        file.seek(8)
        file.write(ordered)
