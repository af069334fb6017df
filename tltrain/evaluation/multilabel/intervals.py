"""95 % intervals of means over labels, by the bootstrap over test images or whole groups."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.runs.report.stats import RESAMPLES, wilson

LEAST_DRAWS, MOST_VALUES, MOST_ANSWERS = 200, 200_000_000, 1_000_000
"""Resamples at least; answers (images times labels) times resamples at most, for a few seconds; answers beyond which none is made."""
AT_A_TIME = 2_000_000
"""Numbers of resamples by images that are held at a time."""


def intervals(p: LabelPredictions, seed: int = 0) -> dict[str, list[float]]:
    """Name of a metric to the ends of its interval: map, auroc_macro, f1_macro, f1_micro. Empty for too many answers, or broken ones."""
    if p.logit.size > MOST_ANSWERS or not np.isfinite(p.logit).all() or not p.target.any():
        return {}
    num_draws = min(RESAMPLES, max(LEAST_DRAWS, MOST_VALUES // p.logit.size))
    num_groups, times = resampled(len(p.target), p.group, num_draws, seed)
    found = [weighted(p, times_BN) for times_BN in times]
    return {name: _ends(np.concatenate([each[name] for each in found]), num_groups) for name in found[0]}


def resampled(num: int, group_N: np.ndarray | None, num_draws: int, seed: int) -> tuple[int, Iterator[np.ndarray]]:
    """(number of groups, how often each of `num` images is drawn, (B, N), some draws at a time). Images of a group are drawn together.

    group_N: None: each image alone. The same arguments draw the same, so that two networks on the same images are paired.
    """
    of_N = np.arange(num) if group_N is None else np.unique(group_N, return_inverse=True)[1].ravel()
    num_groups, size = int(of_N.max()) + 1, max(1, AT_A_TIME // num)

    def times() -> Iterator[np.ndarray]:
        generator = np.random.default_rng(seed)
        for start in range(0, num_draws, size):
            drawn = (generator.integers(0, num_groups, num_groups) for _ in range(min(size, num_draws - start)))
            yield np.stack([np.bincount(each, minlength=num_groups) for each in drawn])[:, of_N].astype(np.float64)

    return num_groups, times()


def _ends(value_B: np.ndarray, num_groups: int) -> list[float]:
    """Of a metric's values over the resamples. One of no width says nothing: Wilson's stands in its place."""
    there = value_B[np.isfinite(value_B)]
    low, high = np.quantile(there, (0.025, 0.975)) if len(there) else (0.0, 1.0)
    return list(wilson(float(low), num_groups)) if low == high else [float(low), float(high)]


def weighted(p: LabelPredictions, weight_BN: np.ndarray) -> dict[str, np.ndarray]:
    """Name of a metric to its values (B,), where image n counts weight_BN[b, n] times. A mean is over the labels that have a value."""
    pairs = [ranked(p.logit[:, k], p.target[:, k], weight_BN) for k in range(p.target.shape[1])]
    had_BK, said_BK = weight_BN @ p.target, weight_BN @ p.named
    hit_BK = weight_BN @ (p.target & p.named)
    with np.errstate(invalid="ignore"):
        f1_BK = np.where(had_BK > 0, 2 * hit_BK / (had_BK + said_BK), np.nan)
        micro_B = 2 * hit_BK.sum(1) / (had_BK.sum(1) + said_BK.sum(1))
    return {
        "map": mean_of_finite(np.stack([ap for ap, _ in pairs], 1)),
        "auroc_macro": mean_of_finite(np.stack([auroc for _, auroc in pairs], 1)),
        "f1_macro": mean_of_finite(f1_BK),
        "f1_micro": micro_B,
    }


def mean_of_finite(value_BK: np.ndarray) -> np.ndarray:
    """The mean (B,) over the labels that have a value. NaN where none has one."""
    there_BK = np.isfinite(value_BK)
    with np.errstate(invalid="ignore"):
        mean_B: np.ndarray = np.where(there_BK, value_BK, 0).sum(1) / there_BK.sum(1)
    return mean_B


def ranked(logit_N: np.ndarray, target_N: np.ndarray, weight_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(average precision (B,), area under the ROC curve (B,)) of one label, as scikit-learn defines them. NaN where it has no value."""
    order = np.argsort(-logit_N, kind="stable")
    last = np.append(np.flatnonzero(np.diff(logit_N[order])), len(order) - 1)  # equal logits are one step of the curves
    with_BR = np.cumsum(weight_BN[:, order] * target_N[order], axis=1)[:, last]
    all_BR = np.cumsum(weight_BN[:, order], axis=1)[:, last]
    without_BR = all_BR - with_BR
    step_BR = np.diff(with_BR, axis=1, prepend=0)
    below_BR = without_BR[:, -1:] - (without_BR + np.concatenate([np.zeros((len(all_BR), 1)), without_BR[:, :-1]], 1)) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        ap_B = (step_BR * np.where(all_BR > 0, with_BR / all_BR, 0)).sum(1) / with_BR[:, -1]
        auroc_B = (step_BR * below_BR).sum(1) / (with_BR[:, -1] * without_BR[:, -1])
    return ap_B, auroc_B
