"""How right networks are about images that they never saw, to set one beside another on the same images.

Of one class an image: accuracy. Of several labels: mean average precision, with intervals by the bootstrap over images or groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tltrain.evaluation.multilabel import intervals
from tltrain.runs.report.formatting import percent
from tltrain.runs.report.stats import Interval, accuracy_interval, gain_interval, wilson

RESAMPLES = 500


@dataclass(frozen=True)
class Judged:
    """The answers of one network, or of one for each fold, to some images."""

    value: float
    """Accuracy, or mean average precision over the labels that some images have."""
    right: np.ndarray
    """(N,) whether each image is right: of several labels, all of them."""
    draws: np.ndarray
    """(RESAMPLES,) of several labels the same of images drawn anew. Two heads on the same images are drawn alike, so that their draws are
    pairs. Else empty."""
    group: np.ndarray | None = None
    """(N,) the group of each image, where images of a group are alike. None: each stands alone."""

    @property
    def interval(self) -> Interval:
        """With the ends at 95 %. Where no draw differs, which says nothing, Wilson's (Wilson 1927) of as many images or groups."""
        if not len(self.draws):
            return accuracy_interval(self.right, self.group)
        num = len(self.right) if self.group is None else len(np.unique(self.group))
        return Interval(self.value, *(_ends(self.draws) if np.ptp(self.draws) else wilson(self.value, num)))

    @property
    def shown(self) -> str:
        """The value in words: 91.0 %, or mAP 91.0 %."""
        return f"mAP {percent(self.value)}" if len(self.draws) else percent(self.value)

    def lead(self, other: Judged) -> Interval:
        """By how much it is better than another on the same images: a paired difference with its interval."""
        if len(self.draws):
            return Interval(self.value - other.value, *_ends(self.draws - other.draws))
        return gain_interval(other.right, self.right, self.group)


def by_right(right_N: np.ndarray, group_N: np.ndarray | None = None) -> Judged:
    """Of one class an image. right_N: whether each is right."""
    return Judged(float(right_N.mean()), right_N, np.zeros(0), group_N)


def by_logits(logits_NK: np.ndarray, label: np.ndarray, group_N: np.ndarray | None = None, resamples: int = RESAMPLES) -> Judged:
    """label: (N,) classes, or (N, K) labels. group_N: as `Judged.group`. resamples: of several labels, 0 for the value alone."""
    if label.ndim == 1:
        return by_right(logits_NK.argmax(1) == label, group_N)
    num = len(label)
    value = _mean(logits_NK, label, np.ones((1, num)))[0]
    _, times = intervals.resampled(num, group_N, resamples, seed=0)
    draws = [_mean(logits_NK, label, times_RN) for times_RN in times]
    return Judged(float(value), ((logits_NK > 0) == label).all(1), np.concatenate([np.zeros(0), *draws]), group_N)


def by_answers(answer: np.ndarray, group_N: np.ndarray | None = None) -> Judged:
    """answer: (N,) whether each image is right, or of several labels (N, 2, K): its logits, and 1 where it has a label."""
    return by_right(answer, group_N) if answer.ndim == 1 else by_logits(answer[:, 0], answer[:, 1] > 0, group_N)


def _ends(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a bootstrap."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _mean(logits_NK: np.ndarray, label_NK: np.ndarray, times_RN: np.ndarray) -> np.ndarray:
    """(R,): mean average precision where image n counts times_RN[r, n] times. A label that none of a draw has is left out of its mean."""
    columns = zip(logits_NK.T, label_NK.T, strict=True)
    ap_RK = np.stack([intervals.ranked(logit_N, has_N, times_RN)[0] for logit_N, has_N in columns], 1)
    return np.nan_to_num(intervals.mean_of_finite(ap_RK))
