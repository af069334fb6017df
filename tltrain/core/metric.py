"""What a metric is, and finding one by name. The metrics themselves stand in tltrain/evaluation/metrics.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from tltrain.core import registry


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation. It is registered by name (tltrain/registry.py, kind metrics)."""

    value: Callable[[Any, int], float | None]
    """(predictions, number of classes) -> the figure; None where it says nothing."""
    higher_is_better: bool = True
    title: str = ""
    """What a page calls it; empty: its name."""
    is_share: bool = False
    """Whether it lies between 0 and 1, and is shown in per cent."""


def metric(name: str) -> Metric:
    """The metric with a name. Raises UserError."""
    return cast(Metric, registry.find("metrics", name, f"the metric is {name!r}"))


def is_better(value: float, best: float | None, name: str) -> bool:
    """Strictly better by the metric with this name: a tie keeps the earlier weights."""
    return best is None or (value > best if metric(name).higher_is_better else value < best)
