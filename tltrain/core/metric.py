"""The Metric type, and looking one up by name. The metrics themselves are in tltrain/evaluation/metrics.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from tltrain.core import registry
from tltrain.core.errors import UserError

RESERVED = frozenset({
    "kind", "time", "stage", "stage_index", "step", "run_step", "epoch", "split", "n", "best", "share", "curve",
    "weights", "seconds", "classes", "per_class", "confusion", "reliability", "calibration",
})  # fmt: skip
"""Keys that stand beside the metrics in a row of metrics-*.jsonl and in test_metrics.json. No metric may have such a name."""


@dataclass(frozen=True)
class Metric:
    """One number that an evaluation reports. It is registered by name (tltrain/core/registry.py, kind metrics)."""

    value: Callable[[Any, int], float | None]
    """(predictions, number of classes) -> the value. None where it is undefined."""
    higher_is_better: bool = True
    title: str = ""
    """Its name in reports. Empty: the registered name."""
    is_share: bool = False
    """Whether it lies between 0 and 1 and is shown in per cent."""


def metric(name: str) -> Metric:
    """The metric with this name. Raises UserError for an unknown name, and for one that would overwrite another value of a row."""
    if name in RESERVED:
        raise UserError(f"a metric is called {name}, and rows of metrics hold another value under that name; rename its entry point")
    return cast(Metric, registry.find("metrics", name, f"the metric is {name!r}"))


def is_better(value: float, best: float | None, name: str) -> bool:
    """Whether `value` is strictly better than `best` by the metric with this name. A tie keeps the earlier weights."""
    return best is None or (value > best if metric(name).higher_is_better else value < best)
