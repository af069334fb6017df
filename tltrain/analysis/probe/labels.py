"""What a probe counts of several labels an image: mean average precision, with intervals by the bootstrap over images or groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tltrain.evaluation.multilabel import intervals
from tltrain.runs.report.stats import wilson

RESAMPLES = 500


@dataclass(frozen=True)
class Ranked:
    """Mean average precision over the labels that some images have."""

    value: float
    draws: np.ndarray
    """(RESAMPLES,) the same of images drawn anew. Two heads on the same images are drawn alike, so that their draws are pairs."""
    num: int
    """Images, or groups of them."""

    @property
    def ends(self) -> tuple[float, float]:
        """The 95 % interval. Where no draw differs, which says nothing, Wilson's (Wilson 1927) of as many images."""
        return ends(self.draws) if np.ptp(self.draws) else wilson(self.value, self.num)


def ends(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a bootstrap."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def ranked(logits_NK: np.ndarray, label_NK: np.ndarray, group_N: np.ndarray | None, resamples: int = RESAMPLES) -> Ranked:
    """How well the logits of each label order the images. group_N: images of a group are drawn together; None: each alone.

    resamples: how often images are drawn anew, in the same order by each call.
    """
    num = len(label_NK)
    value = _mean(logits_NK, label_NK, np.ones((1, num)))[0]
    num_groups, times = intervals.resampled(num, group_N, resamples, seed=0)
    draws = [_mean(logits_NK, label_NK, times_RN) for times_RN in times]
    return Ranked(float(value), np.concatenate([np.zeros(0), *draws]), num_groups)


def _mean(logits_NK: np.ndarray, label_NK: np.ndarray, times_RN: np.ndarray) -> np.ndarray:
    """(R,): mean average precision where image n counts times_RN[r, n] times. A label that none of a draw has is left out of its mean."""
    columns = zip(logits_NK.T, label_NK.T, strict=True)
    ap_RK = np.stack([intervals.ranked(logit_N, has_N, times_RN)[0] for logit_N, has_N in columns], 1)
    return np.nan_to_num(intervals.mean_of_finite(ap_RK))
