"""Measures each image's pixels once, without a network: size, contrast, sharpness, and a small grey copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tltrain.analysis.doctor.findings import BLANK, BLURRED, THIN, TINY, Finding
from tltrain.core.files import in_parallel
from tltrain.data.tables.corrections import EXCLUDE, LOOK

SIDE = 224
"""Longest side at which contrast and sharpness are measured, so that they do not depend on how many pixels a camera has."""
GREY = 16
"""Side of the small copy."""
LEAST_CONTRAST = 4.0
"""Standard deviation of grey values below which an image counts as blank: JPEG leaves some in one colour."""
LEAST_SIDE = 4
"""An image is tiny if its longer side is the network's input divided by this, or less."""
MOST_ASPECT = 4.0
MOST_BLUR = 4.0
"""Spreads of the set below the median of log sharpness. Measured with `python -m benchmarks.doctor`."""
LEAST_SPREAD = 0.35
"""Of log sharpness: a set whose images are all alike would otherwise call half of them blurred."""


@dataclass(frozen=True)
class Look:
    """One image, looked at once."""

    size: tuple[int, int]
    contrast: float
    """Standard deviation of its grey values, of 255."""
    sharpness: float
    """Variance of its Laplacian divided by the variance of its grey values, at `SIDE` pixels or its own size if that is less."""
    grey: np.ndarray
    """uint8 (GREY, GREY), stretched to a square."""


def look(image: Image.Image) -> Look:
    """Measure one RGB image."""
    grey = image.convert("L")
    small = grey.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=None)
    pixels_HW = np.asarray(small, dtype=np.float32)
    variance = float(pixels_HW.var())
    tile = np.asarray(grey.resize((GREY, GREY), Image.Resampling.BOX))
    return Look(image.size, variance**0.5, float(_laplacian(pixels_HW).var()) / max(variance, 1e-6), tile)


def look_at(read: Callable[[int], Image.Image], numbers: Sequence[int]) -> Iterator[Look]:
    """Look at each image, in order, on several threads: Pillow decodes without Python's lock."""
    return in_parallel(lambda number: look(read(number)), numbers)


def _laplacian(pixels_HW: np.ndarray) -> np.ndarray:
    """The four neighbours less four times the pixel, without the border. A single 0 for an image that is all border."""
    if min(pixels_HW.shape) < 3:
        return np.zeros(1, dtype=np.float32)
    inner = pixels_HW[1:-1, 1:-1]
    return pixels_HW[:-2, 1:-1] + pixels_HW[2:, 1:-1] + pixels_HW[1:-1, :-2] + pixels_HW[1:-1, 2:] - 4 * inner


def blank(looks: Sequence[Look]) -> np.ndarray:
    """Mask (N,) of the images that are hardly anything but one colour."""
    return np.array([each.contrast < LEAST_CONTRAST for each in looks], dtype=bool)


def blur(looks: Sequence[Look]) -> np.ndarray:
    """How much less sharp each image is than the set: spreads below the median of log sharpness (N,). 0 for blank images."""
    log_N = np.log(np.maximum([each.sharpness for each in looks], 1e-9))
    seen_N = ~blank(looks)
    if not seen_N.any():
        return np.zeros(len(looks))
    middle = float(np.median(log_N[seen_N]))
    spread = max(LEAST_SPREAD, 1.4826 * float(np.median(np.abs(log_N[seen_N] - middle))))
    return np.where(seen_N, (middle - log_N) / spread, 0.0)


def tiny(looks: Sequence[Look], size: int) -> np.ndarray:
    """Mask (N,) of the images whose longer side is a quarter of `size`, the side that the network sees, or less."""
    return np.array([max(each.size) * LEAST_SIDE <= size for each in looks], dtype=bool)


def pixel_problems(looks: Sequence[Look], ids: Sequence[str], size: int) -> list[Finding]:
    """Blank, blurred, tiny, and long and thin images. size: side of the square that the network sees, pixels.

    Where most of a set is tiny, that is what it is like, and no image is named for it.
    """
    found = []
    blank_N, blur_N, tiny_N = blank(looks), blur(looks), tiny(looks, size)
    tiny_N &= tiny_N.mean() <= 0.5
    for i, (each, name) in enumerate(zip(looks, ids, strict=True)):
        longer, shorter = max(each.size), min(each.size)
        if blank_N[i]:
            found.append(Finding(name, BLANK, EXCLUDE, each.contrast, position=i))
        if tiny_N[i]:
            found.append(Finding(name, TINY, LOOK, longer, position=i))
        elif blur_N[i] >= MOST_BLUR:  # enlarged images are blurred, and named as tiny
            found.append(Finding(name, BLURRED, LOOK, float(blur_N[i]), position=i))
        if longer >= MOST_ASPECT * shorter:
            found.append(Finding(name, THIN, LOOK, longer / shorter, position=i))
    return found
