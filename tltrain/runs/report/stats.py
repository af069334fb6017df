"""How sure one may be of a share, and of a difference between two runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats as scipy_stats

RESAMPLES = 2000


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in n samples (Wilson 1927): good for small n and near 0 and 1 too."""
    if n == 0:
        return 0.0, 1.0
    found = scipy_stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def mcnemar(a_N: np.ndarray, b_N: np.ndarray) -> tuple[int, int, float]:
    """Two runs, right or wrong on the same images (N,) bool: how many only `a` gets right, how many only `b`, and the exact two-sided
    p (McNemar 1947): the chance of a split at least as uneven if each such image fell to either run with equal odds."""
    only_a, only_b = int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum())
    return only_a, only_b, float(scipy_stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def bootstrap(statistic: Callable[..., np.ndarray], *columns: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a figure over resampled test images (Efron 1979).

    columns: (N,) each, one value an image; they are resampled together, so that a difference of two runs is a paired one.
    statistic: takes the columns as (..., N) and `axis`, and returns (...).
    """
    size = max(1, 2_000_000 // len(columns[0]))
    found = scipy_stats.bootstrap(
        columns, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=size, method="percentile", rng=seed
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def f1_macro(label: np.ndarray, predicted: np.ndarray, axis: int = -1) -> np.ndarray:
    """F1, mean over the classes that occur; integer columns (..., N)."""
    label_RN, predicted_RN = (column.reshape(-1, column.shape[-1]) for column in (label, predicted))
    num_classes = 1 + int(max(label.max(), predicted.max()))
    offset_R1 = num_classes * np.arange(len(label_RN))[:, None]

    def counted(column_RN: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        flat = np.bincount((offset_R1 + column_RN).ravel(), weights, minlength=num_classes * len(label_RN))
        return flat.reshape(-1, num_classes)

    hit_RK = counted(label_RN, (label_RN == predicted_RN).ravel())
    both_RK = counted(label_RN) + counted(predicted_RN)
    f1_R = (2 * hit_RK / np.maximum(both_RK, 1)).sum(1) / (both_RK > 0).sum(1)
    return f1_R.reshape(label.shape[:-1])


def gain(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """How much larger a share of the same images `b` gets right than `a`; columns (..., N) bool."""
    return b.mean(axis) - a.mean(axis)
