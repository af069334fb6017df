"""How sure one may be of a share, and of a difference between two runs."""

from __future__ import annotations

import math
from collections.abc import Mapping

_Z95 = 1.959964  # the normal quantile of .975


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in n samples (Wilson 1927): good for small n and near 0 and 1 too."""
    if n == 0:
        return 0.0, 1.0
    z2 = _Z95**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(a: Mapping[str, bool], b: Mapping[str, bool]) -> tuple[int, int, float]:
    """Two runs on the same samples: how many only `a` gets right, how many only `b`, and the exact two-sided p (McNemar 1947).

    p is the chance of a split at least as uneven if each such sample fell to either run with equal odds.
    """
    only_a = sum(a[k] and not b[k] for k in a)
    only_b = sum(b[k] and not a[k] for k in a)
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return only_a, only_b, min(1.0, 2 * tail / 2**n)
