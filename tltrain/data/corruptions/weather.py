"""Weather: snow, fog, and more light. Fog and light after ImageNet-C; snow is our own, since theirs turns on details of its code."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from tltrain.data.corruptions.blur import convolved, trail

FALL = ((0.03, 2.0, 8, 0.2), (0.06, 2.4, 10, 0.3), (0.09, 2.8, 12, 0.4), (0.12, 3.2, 14, 0.5), (0.15, 3.6, 16, 0.6))
"""Of snow, by severity: share of the image that flakes cover, their size and the length of their fall (pixels at a side of 224), and how
far the scene pales."""
FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))
"""Amount of fog, and the factor from one octave of its clouds to the next finer one, by severity."""
LIGHT = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Added to the value (V of HSV), by severity."""


def snow(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    cover, flake, fall, pale = FALL[severity - 1]
    size = x_HWC.shape[:2]
    coarse = tuple(max(2, round(side / max(1.0, flake * scale))) for side in size)
    field = enlarged(generator.standard_normal(coarse), size)
    edge = np.quantile(field, 1 - cover)
    flakes = np.clip((field - edge) / (0.3 * field.std()), 0, 1)
    streaks = convolved(flakes[:, :, None], trail(fall * scale, fall * scale / 2, generator.uniform(-120, -60)))
    grey = x_HWC @ np.array([0.299, 0.587, 0.114])  # luma of BT.601
    scene = (1 - pale) * x_HWC + pale * np.maximum(x_HWC, (0.5 + 0.5 * grey)[:, :, None])
    return scene + 1.5 * (1 - scene) * np.maximum(streaks, 0.6 * flakes[:, :, None])


def fog(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    amount, falls = FOG[severity - 1]
    top = max(float(x_HWC.max()), 1e-9)
    return (x_HWC + amount * clouds(x_HWC.shape[:2], falls, generator)[:, :, None]) * top / (top + amount)


def brightness(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    """V of HSV raised; hue and saturation stay. Black becomes grey."""
    value = x_HWC.max(2, keepdims=True)
    raised = np.minimum(1.0, value + LIGHT[severity - 1])
    return np.where(value > 0, x_HWC * raised / np.maximum(value, 1e-9), raised)


def clouds(size: tuple[int, int], falls: float, generator: np.random.Generator) -> np.ndarray:
    """Clouds (H, W) from 0 to 1: random grids of 2, 4, 8, ... cells, each finer one weaker by the factor `falls`, added up."""
    octaves = max(1, math.ceil(math.log2(max(size))))
    total = np.zeros(size)
    for octave in range(1, octaves + 1):
        cells = tuple(min(side, 2**octave) + 1 for side in size)
        total += falls**-octave * enlarged(generator.random(cells), size)
    return (total - total.min()) / max(float(total.max() - total.min()), 1e-9)


def enlarged(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A grid (h, w) as (H, W), bicubic."""
    image = Image.fromarray(grid.astype(np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC), dtype=np.float64)
