"""Statistics: confidence intervals of a share, and tests of the difference between two runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats as scipy_stats

RESAMPLES = 2000
"""Resamples of a bootstrap interval."""
FLIPS = 9_999
"""Draws of `sign_flips`."""


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n samples (Wilson 1927). It also holds for small n, and for shares near 0 and 1."""
    if n == 0:
        return 0.0, 1.0
    ends = scipy_stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def mcnemar(a_N: np.ndarray, b_N: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test (1947) of two runs on the same images: (images that only `a` gets right, that only `b` does, two-sided p).

    a_N, b_N: (N,) bool, whether each image is right. p is the chance of a split at least as uneven if both runs were equally good.
    """
    only_a, only_b = int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum())
    return only_a, only_b, float(scipy_stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_flips(a_N: np.ndarray, b_N: np.ndarray, seed: int = 0) -> tuple[int, int, float]:
    """As `mcnemar`, for shares of several predictions of each image: (images that `a` gets right more often, that `b` does, two-sided p).

    a_N, b_N: (N,) in [0, 1]. p is the chance that the difference is as large if its sign were drawn anew for each image (Fisher 1935), by
    FLIPS draws. For shares of 0 and 1 alone, McNemar's test is exactly that.
    """
    differ_N = (a_N - b_N)[a_N != b_N]
    if len(differ_N) == 0:
        return 0, 0, 1.0
    generator, size, num_as_large = np.random.default_rng(seed), max(1, 2_000_000 // len(differ_N)), 0
    for start in range(0, FLIPS, size):
        signs_BN = 1 - 2 * generator.integers(0, 2, (min(size, FLIPS - start), len(differ_N)))
        num_as_large += int((np.abs(signs_BN @ differ_N) >= abs(differ_N.sum()) - 1e-9).sum())
    return int((differ_N > 0).sum()), int((differ_N < 0).sum()), (1 + num_as_large) / (1 + FLIPS)


def bootstrap(statistic: Callable[..., np.ndarray], *columns: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a metric over resampled test images (Efron 1979).

    columns: (N,) each, one value for each image. They are resampled together, so a difference of two runs is a paired one.
    statistic: maps the columns as (..., N), and `axis`, to (...).
    """
    size = max(1, 2_000_000 // len(columns[0]))
    result = scipy_stats.bootstrap(
        columns, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=size, method="percentile", rng=seed
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def f1_macro(label: np.ndarray, predicted: np.ndarray, axis: int = -1) -> np.ndarray:
    """Macro F1 (...): the mean F1 of the classes that occur. label, predicted: (..., N) integers."""
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
    """Accuracy of `b` minus accuracy of `a` (...) on the same images. a, b: (..., N) bool, whether each image is right."""
    return b.mean(axis) - a.mean(axis)
