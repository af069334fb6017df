"""Temperature scaling (Guo et al. 2017): calibrates a network's probabilities with one number fitted on val."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

LEAST, MOST = 0.05, 20.0
"""Bounds of the temperature."""


def fit_temperature(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """The temperature in [LEAST, MOST] that minimises the cross entropy of logits / temperature, logits (N, K), with labels (N,).

    The targets are smoothed by 1 / (N + 2), as in Platt (1999). With plain targets, a network that is right on every image would get a
    temperature of zero, and would claim to be certain.
    """
    n, num_classes = logits_NK.shape
    smoothing = 1 / (n + 2)
    target_NK = np.full((n, num_classes), smoothing / max(1, num_classes - 1))
    target_NK[np.arange(n), labels_N] = 1 - smoothing

    def cross_entropy(log_temperature: float) -> float:
        return float(-(target_NK * log_softmax(logits_NK / np.exp(log_temperature), axis=1)).sum(1).mean())

    bounds = (np.log(LEAST), np.log(MOST))
    return float(np.exp(minimize_scalar(cross_entropy, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))
