"""Statistics: the intervals that every page and table shows, and tests of the difference between two runs.

One figure has one kind of interval, wherever it stands. All are of 95 %.

- A share of images that are judged once each, such as an accuracy, a recall or a bin of confidence: Wilson's.
- The same of images in groups: Wilson's for as many images as the groups are worth (`grouped_wilson`).
- The same of images that are judged several times each: the bootstrap, which draws images with all their answers.
- Macro F1: the bootstrap over images, or over whole groups.
- A difference of two runs on the same images: the bootstrap over images or groups, each drawn with the answers of both.
- A difference of recipes over seeds: Welch's t, over runs (`tltrain.runs.pages.comparison.welch`).

A bootstrap interval of no width, where all answers are right or all are wrong, says nothing: Wilson's stands in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as scipy_stats

RESAMPLES = 2000
"""Resamples of a bootstrap interval."""
FLIPS = 9_999
"""Draws of `sign_flips`."""
Z = float(scipy_stats.norm.ppf(0.975))


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n samples (Wilson 1927). It also holds for small n, and for shares near 0 and 1."""
    if n == 0:
        return 0.0, 1.0
    ends = scipy_stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def grouped_wilson(right_N: np.ndarray, group_N: np.ndarray) -> Interval:
    """The share of images that is right, where images of a group are alike (several of one patient), and its 95 % interval.

    Wilson's, for as many images as would vary as much if each stood alone: the number of images over the design effect (Kish 1965), which
    is measured between the groups, with Student's t for as many groups (Korn and Graubard 1998). Where all are right, or all are wrong,
    a group is worth one image. Over 400 draws of 20 groups of 2 to 11 images that are all alike, at 95 % right, it holds the truth in 97 %,
    the bootstrap over groups in 63 %, and Wilson's over images in 41 %.
    right_N: (N,) bool, or shares in [0, 1]. group_N: (N,) the group of each image.
    """
    share, n = float(right_N.mean()), len(right_N)
    right_G, size_G = _by_group(right_N, group_N)
    num, z = len(size_G), float(scipy_stats.t.ppf(0.975, max(len(size_G) - 1, 1)))
    if share in (0.0, 1.0) or num == 1:
        return Interval(share, *_wilson(share, num, z if num == 1 else Z))
    variance = num / (num - 1) * float(np.square(right_G - share * size_G).sum()) / n**2
    return Interval(share, *_wilson(share, min(n, share * (1 - share) / variance) if variance else n, z))


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's interval for a number of images that need not be whole, at z standard deviations."""
    middle, half = share + z * z / (2 * n), z * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def mcnemar(a_N: np.ndarray, b_N: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test (1947) of two runs on the same images: (images that only `a` gets right, that only `b` does, two-sided p).

    a_N, b_N: (N,) bool, whether each image is right. p is the chance of a split at least as uneven if both runs were equally good.
    """
    only_a, only_b = int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum())
    return only_a, only_b, float(scipy_stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_flips(a_N: np.ndarray, b_N: np.ndarray, seed: int = 0, group_N: np.ndarray | None = None) -> tuple[int, int, float]:
    """As `mcnemar`, for shares of several predictions of each image: (images that `a` gets right more often, that `b` does, two-sided p).

    a_N, b_N: (N,) in [0, 1]. p is the chance that the difference is as large if its sign were drawn anew for each image (Fisher 1935), by
    FLIPS draws. For shares of 0 and 1 alone, McNemar's test is exactly that. group_N: as of `accuracy_interval`; a group has one sign.
    """
    if group_N is not None:
        p = sign_flips(_by_group(a_N.astype(float) - b_N, group_N)[0], np.zeros(len(np.unique(group_N))), seed)[2]
        return int((a_N > b_N).sum()), int((a_N < b_N).sum()), p
    differ_N = (a_N.astype(float) - b_N)[a_N != b_N]
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


def accuracy_interval(right_N: np.ndarray, group_N: np.ndarray | None = None) -> Interval:
    """The accuracy, and its interval.

    right_N: (N,) bool, or for images with several answers the share in [0, 1] that is right. group_N: (N,) the group of each image, where
    images of a group are alike (None: each stands alone).
    """
    if group_N is not None:
        return grouped_wilson(right_N, group_N)
    share, n = float(right_N.mean()), len(right_N)
    if (right_N == right_N[0]).all() or np.isin(right_N, (0, 1)).all():
        return Interval(share, *wilson(share, n))
    return Interval(share, *bootstrap(_mean, right_N))


def ends_of(row: Mapping[str, Any], share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n images as every page shows it: the one that stands in `row` as `ends`, else Wilson's.

    row: a part of what an evaluation counted. It holds `ends` where images have groups, of which the page knows nothing more.
    """
    low, high = row.get("ends") or wilson(share, n)
    return float(low), float(high)


def gain_interval(a_N: np.ndarray, b_N: np.ndarray, group_N: np.ndarray | None = None) -> Interval:
    """Accuracy of `b` minus accuracy of `a` on the same images, and its interval. Arguments as of `accuracy_interval`."""
    value = float(gain(a_N, b_N))
    if (a_N == b_N).all():
        return Interval(value, 0.0, 0.0)
    if group_N is None:
        return Interval(value, *bootstrap(gain, a_N, b_N))
    return Interval(value, *bootstrap(_ratio, *_by_group(b_N.astype(float) - a_N, group_N)))


def f1_interval(label_N: np.ndarray, *predicted_N: np.ndarray, group_N: np.ndarray | None = None) -> Interval:
    """Macro F1, and its interval. Arguments as of `f1_macro`; group_N as of `accuracy_interval`."""
    value, right = float(f1_macro(label_N, *predicted_N)), np.concatenate([(each == label_N)[each >= 0] for each in predicted_N])
    if right.all() or not right.any():
        return Interval(value, *wilson(float(right.mean()), len(label_N) if group_N is None else len(np.unique(group_N))))
    if group_N is None:
        return Interval(value, *bootstrap(f1_macro, label_N, *predicted_N))
    return Interval(value, *_f1_of_groups(label_N, predicted_N, group_N))


def _f1_of_groups(label_N: np.ndarray, predicted_N: Sequence[np.ndarray], group_N: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of macro F1 over whole groups. What a group adds to each class is counted once, and drawn as one."""
    _, of_N = np.unique(group_N, return_inverse=True)
    num_groups, num_classes = of_N.max() + 1, 1 + int(max(label_N.max(), *(each.max() for each in predicted_N)))
    hit_GK, both_GK = np.zeros((num_groups, num_classes)), np.zeros((num_groups, num_classes))
    for each_N in predicted_N:
        there_N = each_N >= 0
        np.add.at(hit_GK, (of_N, label_N), there_N & (label_N == each_N))
        np.add.at(both_GK, (of_N, label_N), there_N)
        np.add.at(both_GK, (of_N, np.maximum(each_N, 0)), there_N)
    generator, values = np.random.default_rng(seed), np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        times_G = np.bincount(generator.integers(0, num_groups, num_groups), minlength=num_groups)
        hit_K, both_K = times_G @ hit_GK, times_G @ both_GK
        values[i] = (2 * hit_K / np.maximum(both_K, 1)).sum() / (both_K > 0).sum()
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def f1_macro(label: np.ndarray, *predicted: np.ndarray, axis: int = -1) -> np.ndarray:
    """Macro F1 (...): the mean F1 of the classes that occur, over all answers.

    label and each of predicted: (..., N) integers. A predicted class of -1 is no answer.
    """
    size = label.shape[-1]
    label_RN = label.reshape(-1, size)
    num_classes = 1 + int(max(label.max(), *(each.max() for each in predicted)))
    hit_RK, both_RK = np.zeros((len(label_RN), num_classes)), np.zeros((len(label_RN), num_classes))
    for each_RN in (each.reshape(-1, size) for each in predicted):
        there_RN = each_RN >= 0
        hit_RK += _counted(label_RN, there_RN & (label_RN == each_RN), num_classes)
        both_RK += _counted(label_RN, there_RN, num_classes) + _counted(np.maximum(each_RN, 0), there_RN, num_classes)
    f1_R = (2 * hit_RK / np.maximum(both_RK, 1)).sum(1) / (both_RK > 0).sum(1)
    return f1_R.reshape(label.shape[:-1])


def _counted(class_RN: np.ndarray, counts_RN: np.ndarray, num_classes: int) -> np.ndarray:
    """(R, K): how often each class stands in a row, where it counts."""
    flat = (class_RN + num_classes * np.arange(len(class_RN))[:, None]).ravel()
    return np.bincount(flat, counts_RN.ravel(), num_classes * len(class_RN)).reshape(-1, num_classes)


def _by_group(value_N: np.ndarray, group_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sum, number of images) of each group, (G,) each."""
    _, of_N = np.unique(group_N, return_inverse=True)
    return np.bincount(of_N, weights=value_N), np.bincount(of_N).astype(float)


def _ratio(total: np.ndarray, size: np.ndarray, axis: int = -1) -> np.ndarray:
    share: np.ndarray = total.sum(axis) / size.sum(axis)
    return share


def _mean(right: np.ndarray, axis: int = -1) -> np.ndarray:
    return right.mean(axis)


def gain(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """Accuracy of `b` minus accuracy of `a` (...) on the same images. a, b: (..., N) bool, whether each image is right."""
    return b.mean(axis) - a.mean(axis)
