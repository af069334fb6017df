"""Fits one temperature and a threshold per class on val, for several labels."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from tltrain.evaluation.multilabel.predictions import LabelPredictions, binary_cross_entropy

LEAST, MOST = 0.05, 20.0
"""Bounds of the temperature."""


def fit_temperature(p: LabelPredictions) -> float:
    """The temperature in [LEAST, MOST] that minimises the binary cross entropy of logits / temperature.

    Targets are smoothed class by class as in Platt (1999), to (n+ + 1) / (n+ + 2) and 1 / (n- + 2): with plain ones, a network that is
    right about each would claim to be certain.
    """
    num_K, n = p.target.sum(0), len(p.target)
    target_NK = np.where(p.target, (num_K + 1) / (num_K + 2), 1 / (n - num_K + 2))

    def loss(log_temperature: float) -> float:
        return float(binary_cross_entropy(p.logit / np.exp(log_temperature), target_NK).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(LEAST), np.log(MOST)), method="bounded", options={"xatol": 1e-6}).x))


def fit_thresholds(p: LabelPredictions) -> tuple[float, ...]:
    """(K,) for each class the threshold of its calibrated probability with the largest F1. Of equal ones that nearest to 0.5.

    0.5 for a class that no image has, or each. Thresholds lie half-way between two probabilities, so that rounding changes no answer.
    """
    return tuple(_threshold(share_N, target_N) for share_N, target_N in zip(p.calibrated.T, p.target.T, strict=True))


def _threshold(share_N: np.ndarray, target_N: np.ndarray) -> float:
    if not target_N.any() or target_N.all():
        return 0.5
    order = np.argsort(-share_N, kind="stable")
    share_N, target_N = share_N[order], target_N[order]
    last = np.append(np.flatnonzero(np.diff(share_N)), len(share_N) - 1)  # the last of each run of equal probabilities
    right = np.cumsum(target_N)[last]
    f1 = 2 * right / (last + 1 + target_N.sum())
    below = np.append(share_N[last[1:]], 0.0)
    between = (share_N[last] + below) / 2
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(between[best[np.argmin(np.abs(between[best] - 0.5))]])
