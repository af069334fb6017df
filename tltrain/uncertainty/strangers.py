"""Detects images that resemble no training image (out-of-distribution), by the features that the head is given.

The measure is the cosine distance to the nearest training image (Sun et al. 2022, arXiv:2204.06507, k = 1). It was chosen by measuring:
EfficientNet-Lite0's features of 485 pictures, one or two of eight classes held out as strangers, mean of four choices, AUROC and the
strangers missed where 95 % of the known are kept (FPR95):

    nearest image     81.4 %, 69 %      its 5th           77.3 %, 77 %
    Mahalanobis       78.4 %, 78 %      relative to all   80.7 %, 75 %      (shared covariance, Lee et al. 2018; Ren et al. 2021)
    1 - confidence    74.0 %, 82 %      energy            72.0 %, 84 %

Noise was told by all but the last two. Digits on white, which lie close to drawings on white, were told by none: a picture that is
like those of the training in what the features see is no stranger to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

MOST_IMAGES = 10_000
"""Training images that are compared with, spread over the split: 2,048 features each are 82 MB."""
INSIDE = 0.95
"""Share of val's images that count as known."""
BLOCK = 2**24
"""Cosines that are held at a time."""


@dataclass(frozen=True)
class Strangers:
    """Unit feature vectors of training images, and the distance to the nearest of them that most val images stay below."""

    unit_ND: np.ndarray
    """float32, features of training images, scaled to length 1."""
    limit: float
    """The cosine distance that INSIDE of val's images keep below."""

    NAMES: ClassVar[tuple[str, ...]] = ("unit", "limit")

    def arrays(self) -> dict[str, np.ndarray]:
        """For a file, by name."""
        return {"unit": self.unit_ND, "limit": np.array([self.limit])}

    @classmethod
    def of_arrays(cls, held: Mapping[str, np.ndarray]) -> Strangers:
        """What `arrays` gave."""
        return cls(held["unit"], float(held["limit"][0]))

    def score(self, features_BD: np.ndarray) -> np.ndarray:
        """(B,) float64: the distance to the nearest training image as a multiple of `limit`; above 1 for a stranger."""
        return _distance(self.unit_ND, features_BD) / self.limit


def fit_strangers(features_ND: np.ndarray, val_ND: np.ndarray) -> Strangers:
    """From features of training images, and those of val's, which are not among them."""
    unit_ND = _unit(features_ND)
    distance_N = np.sort(_distance(unit_ND, val_ND))
    rank = min(math.ceil(round((len(distance_N) + 1) * INSIDE, 9)), len(distance_N))  # as conformal sets have it
    return Strangers(unit_ND, max(float(distance_N[rank - 1]), float(np.finfo(np.float32).eps)))


def _distance(unit_ND: np.ndarray, features_BD: np.ndarray) -> np.ndarray:
    """(B,) float64: 1 - cosine to the nearest row."""
    size = max(1, BLOCK // len(unit_ND))
    parts = [features_BD[at : at + size] for at in range(0, len(features_BD), size)]
    nearest = [(_unit(part) @ unit_ND.T).max(1) for part in parts]
    return np.clip(1 - np.concatenate([*nearest, np.zeros(0, np.float32)]).astype(np.float64), 0, 2)


def _unit(features_ND: np.ndarray) -> np.ndarray:
    """float32. A row of zeros stays one, and is near to none."""
    rows_ND = features_ND.astype(np.float32)
    length_N1 = np.sqrt(np.square(rows_ND, dtype=np.float64).sum(1, keepdims=True))
    return (rows_ND / np.maximum(length_N1, np.finfo(np.float64).tiny)).astype(np.float32)


def detection_figures(known_N: np.ndarray | None, strange_N: np.ndarray | None) -> dict[str, Any]:
    """How well strangeness tells images of the run's classes from others, ready for JSON. None: there are no such images.

    auroc: the probability that a stranger is stranger than a known image. strangers_missed_at_95: strangers below the strangeness that 95 %
    of these known images keep below (the false positive rate at 95 % true positives, FPR95, with the known as positive).
    """
    counted = [None if s is None else {"n": len(s), "marked": int((s > 1).sum())} for s in (known_N, strange_N)]
    out: dict[str, Any] = {"known": counted[0], "strange": counted[1], "auroc": None, "strangers_missed_at_95": None}
    if known_N is not None and strange_N is not None:
        below = np.searchsorted(np.sort(known_N), strange_N, side="left")
        equal = np.searchsorted(np.sort(known_N), strange_N, side="right") - below
        out["auroc"] = float((below + equal / 2).mean() / len(known_N))
        out["strangers_missed_at_95"] = float((strange_N <= np.quantile(known_N, INSIDE)).mean())
    return out
