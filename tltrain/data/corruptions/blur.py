"""Blur: a lens out of focus (disc), a moving camera (trail), and the Gaussian. Source: ImageNet-C. Lengths are pixels at a side of 224."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve

RADIUS = (3, 4, 6, 8, 10)
"""Radius of the disc, by severity."""
TRAIL = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
"""Length of the trail, and the standard deviation by which it fades."""
SIGMA = (1, 2, 3, 4, 6)
STEPS = 8
"""Points along a pixel, for the disc and the trail."""


def defocus(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    return convolved(x_HWC, disc(RADIUS[severity - 1] * scale))


def motion(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    length, sigma = TRAIL[severity - 1]
    return convolved(x_HWC, trail(length * scale, sigma * scale, generator.uniform(-45, 45)))


def gaussian(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    sigma = SIGMA[severity - 1] * scale
    return np.asarray(gaussian_filter(x_HWC, (sigma, sigma, 0), mode="reflect"))


def disc(radius: float) -> np.ndarray:
    """A filled circle (S, S) of sum 1, S odd. A pixel at its edge counts by the part of it that lies inside."""
    half = max(0, math.ceil(radius - 0.5))
    at = (np.arange((2 * half + 1) * STEPS) + 0.5) / STEPS - half - 0.5
    inside = (at[:, None] ** 2 + at[None, :] ** 2 <= radius**2).astype(np.float64)
    kernel = inside.reshape(2 * half + 1, STEPS, 2 * half + 1, STEPS).mean((1, 3))
    if kernel.sum() == 0:  # a disc that no point of the grid lies in blurs nothing
        kernel[half, half] = 1.0
    return kernel / kernel.sum()


def trail(length: float, sigma: float, angle: float) -> np.ndarray:
    """Motion-blur kernel (S, S) of sum 1, S odd: a line from the middle that fades as half a Gaussian.

    length, sigma: pixels. angle: degrees, against the clock from the right.
    """
    half = math.ceil(length) + 1
    kernel, along = np.zeros((2 * half + 1, 2 * half + 1)), np.arange(0.0, length + 1e-9, 1 / STEPS)
    weight = np.exp(-(along**2) / (2 * max(sigma, 1e-9) ** 2))
    row, column = half - along * math.sin(math.radians(angle)), half + along * math.cos(math.radians(angle))
    top, left = np.floor(row).astype(int), np.floor(column).astype(int)
    for down in (0, 1):  # each point is shared out to the four pixels around it
        for right in (0, 1):
            share = np.abs(1 - down - (row - top)) * np.abs(1 - right - (column - left))
            np.add.at(kernel, (top + down, left + right), weight * share)
    return kernel / kernel.sum()


def convolved(x_HWC: np.ndarray, kernel_SS: np.ndarray) -> np.ndarray:
    """Each channel convolved. Beyond the edges the image is mirrored."""
    half = len(kernel_SS) // 2
    if half == 0:
        return x_HWC
    padded = np.pad(x_HWC, ((half, half), (half, half), (0, 0)), mode="symmetric")
    return np.asarray(fftconvolve(padded, kernel_SS[:, :, None], mode="valid", axes=(0, 1)))
