"""Digital damage: less contrast, fewer pixels, JPEG. Source: ImageNet-C."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

KEPT = (0.4, 0.3, 0.2, 0.1, 0.05)
"""Share of the contrast that is left, by severity."""
SIDE = (0.6, 0.5, 0.4, 0.3, 0.25)
"""Side of the downscaled image, as a share of the side, by severity."""
QUALITY = (25, 18, 15, 10, 7)
"""JPEG quality, by severity. Blocks have 8 pixels at any image size, so that a small image suffers more."""


def contrast(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    mean_C = x_HWC.mean((0, 1))
    return mean_C + KEPT[severity - 1] * (x_HWC - mean_C)


def pixelate(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    image = _image(x_HWC)
    width, height = (max(1, round(side * SIDE[severity - 1])) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.NEAREST)) / 255.0


def jpeg(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    _image(x_HWC).save(file, "JPEG", quality=QUALITY[severity - 1], subsampling="4:2:0")
    with Image.open(file, formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB")) / 255.0


def _image(x_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(255.0 * x_HWC).astype(np.uint8))
