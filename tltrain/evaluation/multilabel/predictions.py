"""Predictions for images with several labels: one probability per class, each from its own logit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import expit
from sklearn.metrics import precision_recall_fscore_support


class LabelScores(NamedTuple):
    """Means over the classes that images have. None: they have none."""

    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class LabelPredictions:
    """Answers for a split, one row for each sample, ordered by position in the split."""

    position: np.ndarray
    """(N,) int64, in the split."""
    target: np.ndarray
    """(N, K) bool: whether a sample has a class."""
    logit: np.ndarray
    """(N, K) float64."""
    temperature: float = 1.0
    """Divides the logits of calibrated probabilities."""
    thresholds: tuple[float, ...] | None = None
    """(K,) the calibrated probability from which each class is named. None: 0.5."""
    group: np.ndarray | None = None
    """(N,) int64, the group of each sample, such as those of one patient. None: each stands alone."""

    @cached_property
    def loss(self) -> np.ndarray:
        """(N,) float64: binary cross entropy, the mean over classes, not calibrated."""
        return binary_cross_entropy(self.logit, self.target).mean(1)

    @cached_property
    def calibrated(self) -> np.ndarray:
        """(N, K) float64: the calibrated probability of each class."""
        return np.asarray(expit(self.logit / self.temperature))

    @cached_property
    def named(self) -> np.ndarray:
        """(N, K) bool: the predicted classes, whose probability reaches their threshold."""
        return self.calibrated >= (0.5 if self.thresholds is None else np.array(self.thresholds))

    @cached_property
    def macro(self) -> LabelScores:
        """By scikit-learn. Cached, since three metrics use it."""
        columns = precision_recall_fscore_support(self.target, self.named, average=None, zero_division=0)[:3]
        there = self.target.any(0)
        return LabelScores(*(float(column[there].mean()) if there.any() else None for column in columns))

    @cached_property
    def sure(self) -> np.ndarray:
        """(N,) float64: the confidence in an image's least certain class, present or absent, calibrated."""
        return np.where(self.named, self.calibrated, 1 - self.calibrated).min(1)


def binary_cross_entropy(logit_NK: np.ndarray, target_NK: np.ndarray) -> np.ndarray:
    """(N, K): of each logit with its target in [0, 1]."""
    return np.asarray(np.logaddexp(0, logit_NK) - target_NK * logit_NK)
