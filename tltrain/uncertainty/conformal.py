"""Sets of classes that hold the true one as often as promised: split conformal prediction (Vovk et al. 2005; Lei et al. 2018).

An image's set is all classes whose calibrated probability reaches one threshold, and always the most probable class. This is LAC, the
score 1 - p of Sadinle, Lei and Wasserman (2019, doi:10.1080/01621459.2017.1395341), and it is taken for three reasons. Its sets are the
smallest that keep the promise, on average. Anybody can check them: they are read off the probabilities with one number. Nothing is drawn:
APS (Romano et al. 2020) spreads the promise better over easy and hard images only with random ties, else its sets are larger; RAPS
(Angelopoulos et al. 2021) has two settings more, to be chosen on images that val would have to give up.

One threshold serves all classes. The promise is then one for all images together, and a class may be covered less: that is shown class
by class on test. A threshold for each class (Mondrian) would promise it to each, and needs `least_images` val images of each: 9 for 90 %,
19 for 95 %, 99 for 99 %. A class with fewer would have to stand in every set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from tltrain.core.errors import UserError
from tltrain.uncertainty.answers import Answers, Val

LEVELS = (0.9, 0.95, 0.99)
"""Coverages that a run's test shows."""


def least_images(coverage: float) -> int:
    """The fewest images of val that can promise a coverage: with n images the rank ceil((n + 1) coverage) must not be above n."""
    return math.ceil(round(coverage / (1 - coverage), 9))


def needs() -> str:
    """How many images of val the usual coverages take."""
    return ", ".join(f"{100 * level:g} % {'takes ' * (i == 0)}{least_images(level):,}" for i, level in enumerate(LEVELS))


@dataclass(frozen=True)
class Sets:
    """The threshold of one coverage."""

    coverage: float
    threshold: float
    """The least calibrated probability of a class in a set."""
    num_val: int
    """Images that it was fitted on."""
    num_groups: int | None = None
    """As in `Answers`."""

    @property
    def between(self) -> tuple[float, float]:
        """The share of all such images that are covered lies in here for 95 of 100 draws of val (Beta, Vovk 2012). Wide for a small val."""
        rank = _rank(self.num_val, self.coverage)
        low, high = stats.beta(rank, self.num_val + 1 - rank).ppf([0.025, 0.975])
        return float(low), float(high)

    def members(self, p_BK: np.ndarray) -> np.ndarray:
        """(B, K) bool, the classes of each set. p_BK: calibrated probabilities. The most probable class is always in: it covers more."""
        in_BK = p_BK >= self.threshold
        in_BK[np.arange(len(p_BK)), p_BK.argmax(1)] = True
        return in_BK


def fit_sets(val: Answers, coverage: float) -> Sets:
    """The threshold with this coverage. Raises UserError where val has fewer than `least_images`.

    It is the ceil((N + 1) coverage)-th largest probability that val's images give their own class. The promise: of images drawn as those
    of val, sets hold the true class with at least this probability, over draws of val and of the image, whatever the network is.
    """
    rank = _rank(len(val), coverage)
    if rank > len(val):
        raise UserError(
            f"{Val(len(val))}, and sets that hold the true class for {100 * coverage:g} % need at least "
            f"{least_images(coverage):,}; ask for less, or train with a larger data.val_fraction"
        )
    return Sets(coverage, float(np.sort(val.own)[-rank]), len(val), val.num_groups)


def reachable(val: Answers, levels: Sequence[float] = LEVELS) -> list[Sets]:
    """The sets of those coverages that val has images enough for."""
    return [fit_sets(val, level) for level in levels if least_images(level) <= len(val)]


def _rank(num: int, coverage: float) -> int:
    return math.ceil(round((num + 1) * coverage, 9))  # rounded: 0.9 is a little more than nine tenths


def figures(sets: Sets, on: Answers, size_N: np.ndarray, label_N: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Coverage and sizes on labelled images, overall and by class, ready for JSON. size_N: (N,) classes in each image's set."""
    in_N = covered(sets, on)
    per_class = [
        {"name": name, "n": int(of.sum()), "covered": int(in_N[of].sum()), "mean_size": float(size_N[of].mean())}
        for k, name in enumerate(classes) if (of := label_N == k).any()
    ]  # fmt: skip
    sizes = np.bincount(size_N.astype(np.int64))
    return {
        "coverage": sets.coverage, "threshold": sets.threshold, "num_val": sets.num_val, "between": list(sets.between),
        "num_groups": sets.num_groups,
        "n": len(on), "covered": int(in_N.sum()), "mean_size": float(size_N.mean()),
        "sizes": {str(size): int(count) for size, count in enumerate(sizes) if count}, "per_class": per_class,
    }  # fmt: skip


def covered(sets: Sets, on: Answers) -> np.ndarray:
    """(N,) bool: whether each image's own class is in its set."""
    return (on.own >= sets.threshold) | on.right
