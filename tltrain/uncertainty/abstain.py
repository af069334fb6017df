"""Abstention (selective classification): a confidence threshold above which a wanted share of the answers is right.

Chow 1970; Geifman and El-Yaniv 2017 (arXiv:1705.08500), whose bound over several thresholds is the one used here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from tltrain.core.errors import UserError
from tltrain.uncertainty.answers import Answers

TARGETS = (0.9, 0.95, 0.99)
"""Accuracies that a run's test shows."""
SHARES = 20
"""Candidate thresholds: those that answer a twentieth of val, two twentieths, ... and all of it."""
SURE = 0.95
"""Confidence level of the bound."""
MOST_POINTS = 200


@dataclass(frozen=True)
class Abstention:
    """A threshold: an image is answered where its calibrated confidence is above it."""

    target: float
    """The accuracy that was asked for."""
    threshold: float
    num_val: int
    """Images of val."""
    answered: int
    """Of them, those above the threshold."""
    right: int
    """Of those, the right ones."""
    num_groups: int | None = None
    """As in `Answers`."""

    @property
    def is_promised(self) -> bool:
        """Whether val is large enough to promise anything: else `least` says less than any network would do."""
        return large_enough(self.num_val if self.num_groups is None else self.num_groups, self.target)

    @property
    def least(self) -> float:
        """With SURE, at least this share of the answers is right for images drawn as those of val, one by one.

        Clopper and Pearson's (1934) one-sided bound at (1 - SURE) / SHARES: it holds for all SHARES thresholds together, and so also for
        the one that was chosen by looking at val.
        """
        if self.right == 0:
            return 0.0
        return float(stats.beta.ppf((1 - SURE) / SHARES, self.right, self.answered - self.right + 1))


def least_images(target: float) -> int:
    """The fewest images of val that can promise an accuracy: where all of them are answered, and right, `Abstention.least` reaches it."""
    return math.ceil(round(math.log((1 - SURE) / SHARES) / math.log(target), 9))


def needs() -> str:
    """How many images of val the usual accuracies take."""
    return (
        ", ".join(f"{100 * target:g} % {'takes ' * (i == 0)}{least_images(target):,}" for i, target in enumerate(TARGETS)) + ", all right"
    )


def large_enough(num: int, target: float = TARGETS[0]) -> bool:
    """Whether so many images of val, drawn one by one, can promise an accuracy of 90 %, or the target where that is less."""
    return num >= least_images(min(target, TARGETS[0]))


def reachable(val: Answers) -> list[Abstention]:
    """The thresholds of TARGETS that val reaches. None of them where val is too small to promise anything."""
    rules = []
    for target in TARGETS if large_enough(val.worth) else ():
        try:
            rules.append(fit_abstention(val, target))
        except UserError:  # not reached on val; the curve shows how far it goes
            continue
    return rules


def fit_abstention(val: Answers, target: float) -> Abstention:
    """The threshold that answers the most images of val while `target` of those answers are right.

    The target is reached on val; what is promised elsewhere is `Abstention.least`. Raises UserError where no threshold reaches it.
    """
    looked_at = _thresholds(val)
    for threshold in sorted(looked_at):
        answered = val.confidence > threshold
        right = int(val.right[answered].sum())
        if right >= target * answered.sum() - 1e-9:
            return Abstention(target, threshold, len(val), int(answered.sum()), right, val.num_groups)
    best = max(float(val.right[val.confidence > threshold].mean()) for threshold in looked_at)
    raise UserError(
        f"no threshold makes {100 * target:g} % of the answers on val right: the surest reach {100 * best:.1f} %; ask for less, or train "
        "for longer or on more images"
    )


def _thresholds(val: Answers) -> list[float]:
    """At most SHARES thresholds, each the confidence of the first image that is not answered: those above it are then drawn like any
    image above it (as the bound needs it). The last answers all.
    """
    descending = np.sort(val.confidence)[::-1]
    counts = sorted({round(len(val) * part / SHARES) for part in range(1, SHARES)} - {0, len(val)})
    found = {float(descending[count]) for count in counts}
    return [0.0, *(t for t in found if t < descending[0])]


def figures(rule: Abstention, on: Answers) -> dict[str, Any]:
    """Figures of a threshold on labelled images, ready for JSON: images, answers, right answers, beside those of val."""
    answered = on.confidence > rule.threshold
    return {
        "target": rule.target, "threshold": rule.threshold, "least": rule.least,
        "val": {"n": rule.num_val, "answered": rule.answered, "right": rule.right}, "num_groups": rule.num_groups,
        "n": len(on), "answered": int(answered.sum()), "right": int(on.right[answered].sum()),
    }  # fmt: skip


def curve(on: Answers) -> list[tuple[float, float]]:
    """(share of images answered, accuracy of those answers) for falling thresholds, at most MOST_POINTS points; the last answers all."""
    order = np.argsort(-on.confidence, kind="stable")
    sure, hits = on.confidence[order], np.cumsum(on.right[order])
    ends = np.flatnonzero(np.append(sure[1:] < sure[:-1], True))  # equally sure images are answered together
    if len(ends) > MOST_POINTS:
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, MOST_POINTS).round().astype(int))]
    return [((end + 1) / len(on), float(hits[end] / (end + 1))) for end in ends.tolist()]
