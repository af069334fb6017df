"""A run's curves, confusion and calibration as files for a paper, SVG and PDF, and its tables as CSV."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.metric import metric
from tltrain.core.output import escape
from tltrain.runs.record import RunRecord, number
from tltrain.runs.report import learning
from tltrain.runs.report.charts import uneven
from tltrain.runs.report.formatting import metric_name
from tltrain.runs.report.stats import ends_of

FORMS = ("svg", "pdf")
WIDTH_IN, HEIGHT_IN = 3.4, 2.4
"""One column of a two-column page."""
COLOURS = ("#0b66a8", "#c8560b", "#067a5c")
MOST_NAMED = 30
"""Classes up to which the confusion matrix has names and counts."""
STYLE: Any = {
    "font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e2e4e7", "grid.linewidth": 0.6,
    "svg.hashsalt": "tltrain", "svg.fonttype": "none", "pdf.fonttype": 42, "legend.frameon": False, "lines.linewidth": 1.4,
}  # fmt: skip


def write_figures(run: RunRecord, folder: Path) -> list[Path]:
    """Write every figure and table that the run has. Returns the files. Raises UserError where the folder cannot be written."""
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # characters missing from matplotlib's font are drawn as boxes
            for name, figure in drawn(run):
                for form in FORMS:
                    written.append(folder / f"{name}.{form}")
                    files.write_atomic(written[-1], saved(figure, form))
        for name, rows in tables(run):
            written.append(folder / f"{name}.csv")
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([[escape.csv_cell(str(cell)) for cell in row] for row in rows])
            files.write_atomic(written[-1], text.getvalue().encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; give another folder with --figures") from error
    return written


def drawn(run: RunRecord) -> Iterator[tuple[str, Figure]]:
    """Name and figure, one after the other."""
    select = run.recipe.select_beside_loss
    yield from _curves(run, "loss", "loss", (("train", COLOURS[0]), ("val", COLOURS[1])))
    yield from _curves(run, "accuracy" if select == "top1" else select, select, (("val", COLOURS[1]),))
    if run.test is not None and "confusion" in run.test:
        yield "confusion", _confusion(run.test["confusion"], [str(name) for name in run.test["classes"]])
        bins = [b for b in run.test["reliability"] if b["n"]]
        if bins:
            yield "calibration", _calibration(bins)


def saved(figure: Figure, form: str) -> bytes:
    """The file of a figure, svg or pdf. It holds no date, so that the same figure is the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format=form, metadata={"Date": None} if form == "svg" else {"CreationDate": None})
    return stream.getvalue()


def new_figure(width: float = WIDTH_IN, height: float = HEIGHT_IN) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _curves(run: RunRecord, name: str, key: str, kinds: Sequence[tuple[str, str]]) -> Iterator[tuple[str, Figure]]:
    """One figure of a value over the steps, with the stages parted. None where the run has no such rows."""
    figure, axes = new_figure()
    for kind, colour in kinds:
        for index in range(len(run.recipe.stages)):  # a gap between stages, which may start from other weights than the last step's
            points = [(run.at(row), number(row, key)) for row in run.of_kind(kind) if row["stage_index"] == index]
            points = [(x, y) for x, y in points if math.isfinite(y)]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    label=kind if kind not in _labels(axes) else "_",
                    marker=_dot(kind),
                    markersize=3,
                )
    if not axes.lines:
        return
    if key == "loss":
        _as_on_the_page(run, axes)
    at = 0
    for steps in run.stage_steps[:-1]:
        at += steps
        axes.axvline(at, color="#626872", linewidth=0.7, linestyle=":")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(metric_name(key).capitalize())
    if metric(key).is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(_labels(axes)) > 1:
        axes.legend()
    yield name, figure


def _as_on_the_page(run: RunRecord, axes: Axes) -> None:
    """Say of the losses what the page says: which are no losses of labels. Losses far apart are on a logarithmic axis."""
    if "train" in _labels(axes) and (taught := learning.of_features(run.recipe)):
        axes.set_title(escape.line(taught), fontsize=7, wrap=True, parse_math=False)
    if uneven([y for line in axes.lines for y in np.asarray(line.get_ydata(), dtype=float).tolist()]):
        axes.set_yscale("log")


def _labels(axes: Axes) -> list[str]:
    return [label for label in axes.get_legend_handles_labels()[1] if not label.startswith("_")]


def _dot(kind: str) -> str | None:
    return "o" if kind == "val" else None


def _confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    named = len(classes) <= MOST_NAMED
    side = max(WIDTH_IN, 0.32 * len(classes) + 1.2) if named else 2 * WIDTH_IN
    figure, axes = new_figure(side, side)
    shares = [[n / max(1, sum(row)) for n in row] for row in matrix]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.grid(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if named:
        names = [escape.line(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        for t, row in enumerate(matrix):
            for p, n in enumerate(row):
                if n:
                    axes.text(p, t, str(n), ha="center", va="center", color="white" if shares[t][p] > 0.5 else "black", fontsize=7)
    return figure


def _calibration(bins: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = new_figure(WIDTH_IN, WIDTH_IN)
    axes.plot([0, 1], [0, 1], color="#626872", linewidth=0.8, linestyle="--")
    for b in bins:
        low, high = ends_of(b, b["accuracy"], b["n"])
        axes.plot([b["confidence"]] * 2, [low, high], color=COLOURS[0], linewidth=1, alpha=0.6)
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o", color=COLOURS[0], markersize=4)
    for axis, word in ((axes.xaxis, "confidence"), (axes.yaxis, "accuracy")):
        axis.set_major_formatter(PercentFormatter(1.0))
        axis.set_label_text(word)
    axes.set_aspect("equal")
    return figure


def tables(run: RunRecord) -> Iterator[tuple[str, list[list[Any]]]]:
    """Name and rows, the first with the names of the columns. Shares are fractions, not percent."""
    rows = [row for row in run.rows if row["kind"] in ("train", "val")]
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if key != "time" and isinstance(value, int | float | str)))
    if rows:
        yield "curves", [keys, *([row.get(key, "") for key in keys] for row in rows)]
    if run.test is None:
        return
    if "per_label" in run.test:
        head = list(run.test["per_label"][0])
        yield "by_label", [head, *([row[key] for key in head] for row in run.test["per_label"])]
    else:
        head = ["name", "support", "precision", "recall", "f1"]
        yield "by_class", [head, *([row[key] for key in head] for row in run.test["per_class"])]
        yield from _confusion_table(run.test)
    yield "test", [["figure", "value"], *([key, value] for key, value in run.test.items() if isinstance(value, int | float))]


def _confusion_table(test: Mapping[str, Any]) -> Iterator[tuple[str, list[list[Any]]]]:
    classes = [str(name) for name in test["classes"]]
    yield "confusion", [["true \\ predicted", *classes], *([name, *row] for name, row in zip(classes, test["confusion"], strict=True))]
