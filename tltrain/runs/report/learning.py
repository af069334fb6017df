"""The section of a comparison on how its runs learned."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tltrain.core.recipe import Recipe
from tltrain.runs.record import RunRecord, number
from tltrain.runs.report.charts import COLOURS, Axis, Line, Point, axis, line_chart, log_axis, thinned, uneven
from tltrain.runs.report.html import Html, el

_MOST_POINTS = 50  # of one curve, fewer than on a run's page, since several curves overlap
_X_LABEL = "images trained on"


def compared(runs: Sequence[tuple[int, str, RunRecord]]) -> Html | None:
    """Charts of accuracy (of mAP for several labels) and loss of every run. None without curves.

    runs: (colour, legend entry, run). Runs of one recipe share a colour, and all but one of them have no legend entry.
    """
    key, title = ("map", "Val mAP, %") if runs[0][2].recipe.data.multilabel else ("top1", "Val accuracy, %")
    accuracy = [Line(name, _curve(run, "val", key), f"s{i % COLOURS}", dots=True) for i, name, run in runs]
    # What a run minimises may be another loss than its neighbour's, such as a teacher's. On val all are cross entropy.
    kind = "val" if all(run.of_kind("val") for _, _, run in runs) else "train"
    loss = [Line(name, _curve(run, kind, "loss"), f"s{i % COLOURS}", dots=kind == "val") for i, name, run in runs]
    top = max(run.num_images for _, _, run in runs)
    charts = []
    if values := _values(accuracy):
        y = axis(min(values), max(values))
        y = Axis(max(0.0, y.low), min(1.0, y.high), [t for t in y.ticks if -1e-9 <= t <= 1 + 1e-9])
        charts.append(line_chart(title, accuracy, y, lambda v: f"{100 * v:.4g}", x_label=_X_LABEL, x_top=top))
    if values := _values(loss):
        y, form = (log_axis(min(values), max(values)), ", logarithmic") if uneven(values) else (axis(0, max(values)), "")
        charts.append(line_chart(f"{kind.capitalize()} loss{form}", loss, y, short, x_label=_X_LABEL, x_top=top))
    return el("section", el("h2", "Learning"), el("div", *charts, class_="pair")) if charts else None


def of_features(recipe: Recipe) -> str:
    """What the loss of the first stage is where the student learns its teacher's features, or its map, and no labels. Else empty."""
    if not recipe.matches_features or recipe.distill is None:
        return ""
    learned = "map" if recipe.distill.target == "tokens" else "features"
    return f"stage {recipe.stages[0].name}: {recipe.distill.loss} loss of the teacher's {learned}"


def short(value: float) -> str:
    """A loss beside its axis: 1e-5, not 1e-05."""
    return f"{value:.4g}".replace("e-0", "e-")


def _curve(run: RunRecord, kind: str, key: str) -> list[Point]:
    return thinned([(float(run.at(row) * run.recipe.batch), number(row, key)) for row in run.of_kind(kind)], _MOST_POINTS)


def _values(lines: Sequence[Line]) -> list[float]:
    return [y for line in lines for _, y in line.points if math.isfinite(y)]
