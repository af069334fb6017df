"""Selection bias: the part of the best recipe's lead that is luck, since the maximum of noisy values is biased upwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

SEEDS, IMAGES = "the spread over seeds", "the number of val images"


@dataclass(frozen=True)
class Luck:
    """The lead of the best of several choices, and the lead that chance alone would give."""

    num_choices: int
    lead: float
    """Of the best over the mean of all, in the unit of the metric; positive."""
    expected: float
    """The lead that choosing would show on average if all were equally good."""
    noise: float
    """Standard deviation of one choice's value."""
    source: str
    """Source of the noise estimate: SEEDS or IMAGES."""

    @property
    def share(self) -> float:
        """Of the lead, at most, that is luck."""
        return min(1.0, self.expected / self.lead) if self.lead > 0 else 1.0


@cache
def largest_of(num: int) -> float:
    """The expected largest of `num` independent standard normal values: 0.56 of two, 1.54 of ten."""
    x = np.linspace(-9, 9, 36_001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    below = np.cumsum(density) * (x[1] - x[0])
    return float(np.sum(x * num * density * np.minimum(below, 1.0) ** (num - 1)) * (x[1] - x[0]))


def luck_of(values: Sequence[Sequence[float]], higher_is_better: bool, is_share: bool, num_val: int) -> Luck | None:
    """Estimates the selection bias of the best choice. values: val metric of each repeat of each choice. num_val: images of val.

    The noise is the spread over the repeats (seeds) of the same choice, pooled. Without repeats it is the binomial spread of a share of
    `num_val` images; it leaves the seed out, and the choices saw the same images, so it is a rough figure. None where neither is known.
    """
    groups = [np.asarray(each, dtype=np.float64) for each in values if len(each)]
    if len(groups) < 2:
        return None
    means = np.array([each.mean() for each in groups])
    lead = float(means.max() - means.mean() if higher_is_better else means.mean() - means.min())
    degrees = sum(len(each) - 1 for each in groups)
    if degrees > 0:
        variance = sum(float(((each - each.mean()) ** 2).sum()) for each in groups) / degrees
        noise = math.sqrt(variance * float(np.mean([1 / len(each) for each in groups])))
        source = SEEDS
    elif is_share and num_val > 0:
        share = float(np.clip(means.mean(), 0.5 / num_val, 1 - 0.5 / num_val))
        noise, source = math.sqrt(share * (1 - share) / num_val), IMAGES
    else:
        return None
    return Luck(len(groups), lead, noise * largest_of(len(groups)), noise, source)
