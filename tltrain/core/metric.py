"""The Metric type, and looking one up by name. The metrics themselves are in tltrain/evaluation/metrics.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from tltrain.core import registry
from tltrain.core.errors import UserError

RESERVED = frozenset({
    "kind", "time", "stage", "stage_index", "step", "run_step", "epoch", "split", "n", "best", "share", "curve",
    "weights", "seconds", "classes", "per_class", "confusion", "reliability", "calibration",
    "per_label", "sets", "abstain", "answered_curve", "views", "strangers", "groups", "ends", "tree", "fitted_on",
})  # fmt: skip
"""Keys that stand beside the metrics in a row of metrics-*.jsonl, in test_metrics.json and in what evaluate gives: names for no metric."""


@dataclass(frozen=True)
class Metric:
    """One number that an evaluation reports. It is registered by name (tltrain/core/registry.py, kind metrics)."""

    value: Callable[[Any, int], float | None]
    """(predictions, number of classes) -> the value. None where it is undefined."""
    higher_is_better: bool = True
    title: str = ""
    """Its name in reports. Empty: the registered name."""
    of: tuple[str, ...] = ("classes",)
    """The data that it is of: `classes` (each image has one class), `labels` (several or none), or both."""
    is_share: bool = False
    """Whether it lies between 0 and 1 and is shown in per cent."""


def of_data(multilabel: bool) -> list[str]:
    """The names of the metrics of images with one class each, or with several labels."""
    return [name for name in registry.names("metrics") if ("labels" if multilabel else "classes") in metric(name).of]


def metric(name: str) -> Metric:
    """The metric with this name. Raises UserError for an unknown name, and for one that would overwrite another value of a row."""
    if name in RESERVED:
        raise UserError(f"a metric is called {name}, and rows of metrics hold another value under that name; rename its entry point")
    return cast(Metric, registry.find("metrics", name, f"the metric is {name!r}"))


def is_better(figures: Mapping[str, Any], best: Mapping[str, Any] | None, select: str) -> bool:
    """Whether val figures are better than the best so far by the metric `select`. Of equal values the lower loss is better.

    On a small val set accuracy stands still while the network learns, and the loss still falls. Equal in both, the earlier weights stay.
    """
    if best is None:
        return True
    if figures[select] == best[select]:
        return best["loss"] is not None and figures["loss"] < best["loss"]
    return bool(figures[select] > best[select] if metric(select).higher_is_better else figures[select] < best[select])
