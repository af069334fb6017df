"""Noise of a sensor: Gaussian (little light), shot (photons are counted), impulse (dead and saturated values). Source: ImageNet-C."""

from __future__ import annotations

import numpy as np

DEVIATION = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviation of Gaussian noise, by severity; white is 1."""
PHOTONS = (60, 25, 12, 5, 3)
"""Mean photon count of white, by severity."""
SHARE = (0.03, 0.06, 0.09, 0.17, 0.27)
"""Share of the values that become 0 or 1, half of them each, by severity."""


def gaussian(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    return x_HWC + DEVIATION[severity - 1] * generator.standard_normal(x_HWC.shape)


def shot(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    photons = PHOTONS[severity - 1]
    return generator.poisson(x_HWC * photons) / photons


def impulse(x_HWC: np.ndarray, severity: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    share, drawn_HWC = SHARE[severity - 1], generator.random(x_HWC.shape)
    return np.where(drawn_HWC < share / 2, 0.0, np.where(drawn_HWC < share, 1.0, x_HWC))
