"""Weights between a stage's start and its end, chosen on val (WiSE-FT: Wortsman et al. 2021, arXiv 2109.01903)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tltrain.core.metric import is_better
from tltrain.core.recipe import Stage
from tltrain.distributed.strategies import Strategy
from tltrain.training.weights import lora
from tltrain.training.weights.mixing import mix

SHARES = tuple(i / 10 for i in range(11))
"""Shares of the end that are tried."""


@dataclass(frozen=True)
class Blend:
    """The blend of a stage's start and end that is best on val."""

    share: float
    """Share of the end, 0 to 1."""
    figures: dict[str, Any]
    """Its metrics on val."""
    curve: tuple[tuple[float, float, float], ...]
    """(share, the metric that selects, val loss) of each share."""
    weights: dict[str, Tensor]
    """Plain weights, complete on every process."""


def blend(strategy: Strategy, start: Mapping[str, Tensor], spec: Stage, evaluate: Callable[[], dict[str, Any]], select: str) -> Blend:
    """Evaluate the blends of `start` with the strategy's present weights. The strategy has the weights of the last one afterwards.

    start: plain weights, complete on every process. evaluate: metrics on val of the weights that the strategy has. Collective.
    """
    last = strategy.weights(everywhere=True)
    first = lora.without_update(last, start)
    found: list[tuple[float, dict[str, Any]]] = []
    for share in SHARES:
        strategy.put(strategy.trained(mix([first, last], [1 - share, share])))
        found.append((share, evaluate()))
    share, figures = chosen(found, select)
    curve = tuple((s, float(f[select]), float(f["loss"])) for s, f in found)
    return Blend(share, figures, curve, lora.merged(mix([first, last], [1 - share, share]), spec))


def chosen(found: Sequence[tuple[float, dict[str, Any]]], select: str) -> tuple[float, dict[str, Any]]:
    """The (share, metrics) that is best by `select`. Of equal ones the one with the lowest val loss, then the one that is nearest to the
    start."""
    share, figures = found[0]
    for other, candidate in found[1:]:
        if is_better(candidate, figures, select):
            share, figures = other, candidate
    return share, figures
