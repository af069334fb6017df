"""The terminal output of `tltrain evaluate`: metrics and guarantees, in 80 columns. Names as on the pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tltrain.core import registry
from tltrain.core.metric import metric
from tltrain.core.output import escape
from tltrain.evaluation.promises.fitted import too_few
from tltrain.runs.report import tree
from tltrain.runs.report.formatting import DASH
from tltrain.runs.report.stats import ends_of
from tltrain.uncertainty import abstain, conformal
from tltrain.uncertainty.abstain import Abstention
from tltrain.uncertainty.answers import Val

LEFT_OUT = {"precision_weighted", "recall_weighted", "f1_weighted"}
"""Metrics that stand in the JSON alone."""
WIDTH = 17
"""Columns of the names."""
MANY = 10
"""Classes from which top-5 says anything: of fewer it is nearly always right."""


def lines_of(figures: Mapping[str, Any]) -> Iterator[str]:
    """All lines of the table. figures: as `command.figures_of` gives them."""
    rows = [*_figures(figures), *_labels(figures), *_doubts(figures)]
    width = max(WIDTH, *(len(name) for name, _ in rows)) + 1
    for name, said in rows:
        yield f"{name:{width}}{said}"


def _figures(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    n, groups = int(figures["n"]), figures.get("groups")
    yield f"{figures['split']} images", f"{n:,}" if groups is None else f"{n:,} in {groups:,} groups of images that are alike"
    right, key, ends = ("all labels right", "subset_accuracy", "subset") if "per_label" in figures else ("accuracy", "top1", "top1")
    yield right, f"{100 * figures[key]:.1f} % ({100 * figures[f'{ends}_low']:.1f} to {100 * figures[f'{ends}_high']:.1f}, 95 % interval)"
    if "tree" in figures:
        yield "by level", tree.line(figures["tree"])
    for name in (name for name in registry.names("metrics") if name in figures and name not in LEFT_OUT | {key}):
        value = figures[name]
        if (value is None and "per_label" not in figures) or (name == "top5" and len(figures["classes"]) <= MANY):
            continue
        said = DASH if value is None else f"{100 * value:.1f} %" if metric(name).is_share else f"{value:.3f}"
        if (ends := figures.get("intervals", {}).get(name)) is not None:
            said += f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})"
        if name == "ece" and (after := figures["calibration"])["temperature"] != 1:
            said += f", calibrated {100 * after['ece']:.1f} %"
        yield escape.line((metric(name).title or name).replace(", macro mean", ", mean")), said


def _labels(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A line on each of several labels."""
    for row in figures.get("per_label", ()):
        values = [f"{key.upper()} {100 * row[key]:.1f} %" for key in ("ap", "auroc", "f1") if row[key] is not None]
        yield escape.line(row["name"]), f"{', '.join(values)}, {row['support']:,} images, named from {row['threshold']:.3f}"


def _doubts(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for row in figures.get("sets", ()):
        yield f"set of {100 * row['coverage']:g} %", f"{_share(row, 'covered')} hold the true class, mean size {row['mean_size']:.2f}"
        for of in row["per_class"]:
            if ends_of(of, of["covered"] / of["n"], of["n"])[1] < row["coverage"]:  # clearly less than is promised for all together
                yield "", f"{_share(of, 'covered')} of class {escape.line(of['name'])}"
    for row in figures.get("abstain", ()):
        right = f"{_share(row, 'right', 'answered')} right" if row["answered"] else "none"
        val = row["val"]
        rule = Abstention(row["target"], row["threshold"], val["n"], val["answered"], val["right"], row["num_groups"])
        promised = f", promised {100 * rule.least:.1f} %" if rule.is_promised else ""
        yield f"abstain {100 * rule.target:g} %", f"{100 * row['answered'] / row['n']:.1f} % answered, {right}{promised}"
        if not rule.is_promised:
            yield "", too_few(rule)
    if (fitted_on := figures.get("fitted_on")) is not None:
        val = Val(**fitted_on)
        if not figures["sets"]:
            yield "sets", f"none: {val}, too few ({conformal.needs()})"
        if not abstain.large_enough(val.worth):
            yield "abstain", f"nothing is promised: {val}, too few ({abstain.needs()})"
    yield from _strangers(figures.get("strangers"))
    if (views := figures.get("views")) is not None:
        low, high = (100 * end for end in views["interval"])
        gained = f"{100 * views['difference']:+.1f} points ({low:+.1f} to {high:+.1f})"
        yield f"{views['num']} views", f"{gained} against one view, {100 * views['top1_of_one']:.1f} %"


def _strangers(found: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if found is None:
        return
    for name, rows in (("known images", found["known"]), ("strangers", found["strange"])):
        if rows is not None:
            yield name, f"{_share(rows, 'marked')} of {rows['n']:,} are marked as strangers"
    if found["auroc"] is not None:
        yield "AUROC", f"{100 * found['auroc']:.1f} % of strangeness between the two"
        yield "FPR at 95 %", f"{100 * found['strangers_missed_at_95']:.1f} % of strangers kept where 95 % of the known are"


def _share(row: Mapping[str, Any], part: str, of: str = "n") -> str:
    low, high = ends_of(row, row[part] / row[of], row[of])
    return f"{100 * row[part] / row[of]:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
