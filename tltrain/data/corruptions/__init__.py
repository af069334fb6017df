"""Corrupted images: noise, blur, weather and digital damage in five severities, after ImageNet-C (Hendrycks and Dietterich 2019).

The operations are written anew. Their strengths follow the paper where it has the operation (arXiv:1903.12261); snow has its own.
Lengths (radii, trails, flakes) are given for images of 224 pixels and grow with the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tltrain.data.corruptions import blur, digital, noise, weather
from tltrain.data.sampler import derive_seed

Operation = Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]
"""(image float64 (H, W, 3) in [0, 1], severity, side / 224, random numbers) -> the corrupted image; values may leave [0, 1]."""

KINDS: dict[str, dict[str, Operation]] = {
    "noise": {"gaussian_noise": noise.gaussian, "shot_noise": noise.shot, "impulse_noise": noise.impulse},
    "blur": {"defocus_blur": blur.defocus, "motion_blur": blur.motion, "gaussian_blur": blur.gaussian},
    "weather": {"snow": weather.snow, "fog": weather.fog, "brightness": weather.brightness},
    "digital": {"contrast": digital.contrast, "pixelate": digital.pixelate, "jpeg": digital.jpeg},
}
OPERATIONS: dict[str, Operation] = {name: operation for kind in KINDS.values() for name, operation in kind.items()}
SEVERITIES: Sequence[int] = range(1, 6)
REFERENCE_SIDE = 224
VERSION = 1
"""Increase it when a change of the code changes pixels: measurements of other pixels are then made anew."""


def corrupt(pixels_HWC: np.ndarray, name: str, severity: int, seed: int, image_id: str) -> np.ndarray:
    """The corrupted image, uint8 (H, W, 3). It depends on the arguments alone: not on processes, threads, or what was asked before.

    pixels_HWC: uint8. name: a key of OPERATIONS. severity: 1 to 5. seed, image_id: they choose the random numbers, with the other two.
    """
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "corruption", name, severity, image_id)))
    scale = min(pixels_HWC.shape[:2]) / REFERENCE_SIDE
    changed_HWC = OPERATIONS[name](pixels_HWC / 255.0, severity, scale, generator)
    # To 1e-4 of a grey level first: what different processors leave in the last bits of a sum then decides no rounding.
    return np.rint(np.round(255.0 * np.clip(changed_HWC, 0.0, 1.0), 4)).astype(np.uint8)
