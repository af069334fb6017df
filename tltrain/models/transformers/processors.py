"""Preprocessing of the hub's processors, found by showing one test pictures: what it does counts, not how its settings are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import AutoImageProcessor, PretrainedConfig

from tltrain.core import untrusted
from tltrain.core.errors import UserError
from tltrain.models.hf_hub import REFUSED, quiet
from tltrain.models.metadata import WeightsMetadata
from tltrain.models.transformers.configs import one_line

PROCESSOR = "preprocessor_config.json"
_SHORT, _LONG = 600, 900
"""Sides of the test pictures, pixels. Every crop and squeeze shows in another share of the long side than of the short one."""
_NAMES = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}
_OURS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
_CLOSE = 1e-4


@dataclass(frozen=True)
class _Seen:
    """Result of probing a processor with test pictures."""

    size: int | None
    """Side of the square that comes out. None for another form."""
    short: float
    """The share of the shorter side that is left."""
    long: float
    black: NDArray[np.float64]
    """Per channel, what black becomes."""
    white: NDArray[np.float64]
    swapped: bool
    """Whether red comes out in the place of blue."""


def with_processor(card: WeightsMetadata, folder: Path, config: PretrainedConfig) -> tuple[WeightsMetadata, tuple[str, ...]]:
    """The metadata with the preprocessing of a folder's processor, and lines for the user on what is done otherwise. Raises UserError."""
    path = folder / PROCESSOR
    raw = untrusted.read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} is {untrusted.cut(raw)}, which is no processor; get the weights anew, or other ones")
    if raw.get("auto_map"):
        raise UserError(f"{path} sets auto_map to {untrusted.cut(raw['auto_map'])}; {REFUSED['auto_map']}")
    try:
        with quiet():
            processor: Any = AutoImageProcessor.from_pretrained(folder, config=config)
            seen = _seen(processor)
    except UserError:
        raise
    except Exception as error:  # transformers raises many types of errors for unexpected values
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    mean, std = _mean_and_std(processor, seen)
    notes = []
    size, (resize, squeezed) = (card.size, (card.size, False)) if seen.size is None else (seen.size, _resize(processor, seen, seen.size))
    if seen.size is None:
        notes.append(f"its processor makes no squares of images; here they are squares of {size} pixels")
    if squeezed:
        notes.append("its processor squeezes an image into a square; here its shorter side is resized, and the middle cropped")
    if seen.swapped:
        notes.append("its processor swaps red and blue, which is not done here: expect more from training all blocks")
    resample = int(getattr(processor, "resample", None) or 0)
    if resample not in _OURS:
        notes.append(f"its processor resizes by {_NAMES.get(resample, resample)}; here it is bicubic")
    interpolation = _OURS.get(resample, "bicubic")
    return replace(card, mean=mean, std=std, size=size, resize=resize, interpolation=interpolation), tuple(notes)


def _seen(processor: Any) -> _Seen:
    """Show a processor pictures. Raises UserError where what comes out is no picture."""
    rows, columns = (np.linspace(0, 1, n) for n in (_SHORT, _LONG))
    slope = np.stack((*np.meshgrid(columns, rows), np.zeros((_SHORT, _LONG))), axis=2)
    flat = np.ones((_SHORT, _LONG, 3))
    black, white, red, sloped = (_through(processor, picture) for picture in (flat * 0, flat, flat * np.array([1.0, 0.0, 0.0]), slope))
    low, high = _middle(black), _middle(white)
    answer = np.abs(_middle(red) - low) / np.maximum(np.abs(high - low), 1e-9)
    swapped = bool(answer[2] > 0.5 > answer[0])
    across, down = (2, 1) if swapped else (0, 1)
    size = sloped.shape[1] if sloped.shape[1] == sloped.shape[2] else None
    lines = (across, sloped[across, sloped.shape[1] // 2, :]), (down, sloped[down, :, sloped.shape[2] // 2])
    long, short = (_share(line, high[channel] - low[channel]) for channel, line in lines)
    return _Seen(size, short, long, low, high, swapped)


def _share(line: NDArray[np.float64], spread: float) -> float:
    """The share of a slope from 0 to `spread` that is left in a line of pixels."""
    inner = line[len(line) // 8 : len(line) - len(line) // 8]  # the edges of a resized picture are bent
    return float((inner[-1] - inner[0]) / spread) * (len(line) - 1) / (len(inner) - 1)


def _through(processor: Any, picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """What becomes of a picture (H, W, 3) in [0, 1]: (3, size, size). Raises UserError."""
    given = np.round(picture * 255).astype(np.uint8)
    values = processor(images=[given], return_tensors="np")["pixel_values"][0]
    out = np.asarray(values, dtype=np.float64)
    if out.ndim != 3 or out.shape[0] != 3 or min(out.shape) < 3:
        raise UserError(
            f"its {PROCESSOR} makes an image of {_SHORT} x {_LONG} pixels an array of {tuple(out.shape)}; 3 channels are needed"
        )
    return out


def _middle(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = picture[:, picture.shape[1] // 2, picture.shape[2] // 2]
    return values


def _mean_and_std(processor: Any, seen: _Seen) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of images in [0, 1] that give what was seen: the processor's own numbers where they do."""
    spread = seen.white - seen.black
    measured = tuple(-seen.black / spread), tuple(1 / spread)
    for mean, std in ((processor.image_mean, processor.image_std), ((0.0,) * 3, (1.0,) * 3)):
        own_mean, own_std = _three(mean), _three(std)
        if own_mean and own_std and np.allclose((own_mean, own_std), measured, rtol=_CLOSE, atol=_CLOSE):
            return own_mean, own_std
    return tuple(float(f"{v:.7g}") for v in measured[0]), tuple(float(f"{v:.7g}") for v in measured[1])


def _resize(processor: Any, seen: _Seen, side: int) -> tuple[int, bool]:
    """Returns (shorter side before the crop to a square of this side, whether the picture was squeezed into a square)."""
    squeezed = abs(seen.long - seen.short) < abs(seen.long - seen.short * _SHORT / _LONG)
    measured = side / min(1.0, seen.short)
    named = [getattr(size, "shortest_edge", None) or getattr(size, "height", None) for size in (processor.size,)]
    share = getattr(processor, "crop_pct", None)
    known = [
        seen.size,
        *(n for n in named if n),
        *(int(n / share) for n in named if n and share),
        *(int(256 / 224 * n) for n in named if n),
    ]
    near = min((n for n in known if n >= side), key=lambda n: abs(math.log(n / measured)))
    return (near if abs(near / measured - 1) < 0.02 else max(side, round(measured))), squeezed


def _three(values: Sequence[float] | float | None) -> tuple[float, ...] | None:
    if isinstance(values, int | float):
        return (float(values),) * 3
    return tuple(map(float, values)) if values is not None and len(values) == 3 else None
