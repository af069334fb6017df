"""One page that compares runs: the same test images, the cost of each, their curves over one another."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from tltrain.pages import parts
from tltrain.pages.charts import Axis, Line, Point, axis, line_chart, thinned
from tltrain.pages.html import Html, el, join, page
from tltrain.pages.read import Run, number, read_right
from tltrain.pages.stats import mcnemar, wilson
from tltrain.pages.words import DASH, count, decimal, duration, ended, interval, percent, plural

_MOST_POINTS = 50  # of one curve: single steps are noise, and several curves lie over one another

Named = tuple[str, Run]


def comparison(runs: Sequence[Named], out: Path, title: str, lead: str) -> str:
    """The whole page; links to the runs' own reports are relative to `out`."""
    return page(
        title,
        el("header", el("h1", title), el("div", lead, class_="soft") if lead else None, *verdict(runs)),
        _table(runs, out),
        _note(runs),
        _curves(runs),
    )


def verdict(runs: Sequence[Named]) -> tuple[Html, Html | None]:
    """Which run gets the most test images right, in one sentence; and whether chance could have made the difference to the next."""
    ranked = sorted((r for r in runs if r[1].test is not None), key=lambda r: -_accuracy(r[1]))
    if not ranked:
        return _sentence("No run has come to its test yet."), None
    (name, first), *others = ranked
    n, share = _num_tested(first), _accuracy(first)
    if not others:
        known = f"95\u202f% interval {interval(share, n)}"
        return _sentence(f"{name}: {percent(share)} of {plural(n, 'test image')} are right ({known})."), None
    second, run = others[0]
    if _accuracy(run) == share:
        return _sentence(f"{name} and {second} get the same share of test images right, {percent(share)} of {count(n)}."), None
    luck, why = _chance(name, first, second, run)
    said = f"{name} gets the most test images right: {percent(share)} of {count(n)}, against {percent(_accuracy(run))} for {second}"
    return _sentence(f"{said}; {'the difference may be luck' if luck else 'more than luck explains'}."), el("p", why)


def _sentence(text: str) -> Html:
    return el("p", text, class_="verdict")


def _accuracy(run: Run) -> float:
    return number(run.test or {}, "top1")


def _num_tested(run: Run) -> int:
    return int((run.test or {})["n"])


def _chance(name_a: str, first: Run, name_b: str, second: Run) -> tuple[bool, str]:
    """Whether the choice of test images may explain the difference of two runs, and how that was judged."""
    a, b = read_right(first.path), read_right(second.path)
    if a and a.keys() == b.keys():
        only_a, only_b, p = mcnemar(a, b)
        shown = "p < .001" if p < 0.001 else f"p = {p:.3f}"
        return p >= 0.05, (
            f"On the same images, {name_a} alone is right on {count(only_a)}, {name_b} alone on {count(only_b)} "
            f"(exact McNemar test, {shown}). That counts the luck of the test images, not of the seed."
        )
    low, high = wilson(_accuracy(first), _num_tested(first))[0], wilson(_accuracy(second), _num_tested(second))[1]
    return low <= high, f"Their 95\u202f% intervals {'overlap' if low <= high else 'do not overlap'}."


def _table(runs: Sequence[Named], out: Path) -> Html:
    tested = [run for _, run in runs if run.test is not None]
    ends = [wilson(_accuracy(run), _num_tested(run)) for run in tested]
    scale = axis(min((e[0] for e in ends), default=0.0), max((e[1] for e in ends), default=1.0))
    low, high = max(0.0, scale.low), min(1.0, scale.high)
    rows = [_row(i, name, run, out, low, high) for i, (name, run) in enumerate(runs)]
    head = ["Run", "Test accuracy", f"{100 * low:.0f} to {100 * high:.0f}\u202f%", "F1, mean", "ECE", "Images trained on", "Time"]
    return parts.table(head, rows, class_="wide")


def _row(index: int, name: str, run: Run, out: Path, low: float, high: float) -> list[str]:
    report = run.path / "report.html"
    where = os.path.relpath(report, out.parent) if report.is_file() else None
    label = el("a", name, href=Path(where).as_posix()) if where else Html(el("span", name))
    first = join(el("i", class_=f"key {_style(index)}"), label)
    cost = [count(run.num_images), duration(run.seconds)]
    if run.test is None:
        return [first, ended(run), "", DASH, DASH, *cost]
    share = _accuracy(run)
    mark = parts.strip(share, *wilson(share, _num_tested(run)), low, high, _style(index))
    return [first, percent(share), mark, percent(number(run.test, "f1_macro")), decimal(number(run.test, "ece")), *cost]


def _style(index: int) -> str:
    return f"s{index % 8}"


def _note(runs: Sequence[Named]) -> Html:
    said = ["The strip shows accuracy with its 95\u202f% interval."]
    if any(run.recipe.backbone.weights for _, run in runs):
        said.append("The cost is each run's own: making the weights it starts from is not counted.")
    if any(run.recipe.distill for _, run in runs):
        said.append("Nor is making a teacher.")
    said.append("Each row is one run; another seed gives other figures.")
    return el("p", " ".join(said), class_="note under")


def _curves(runs: Sequence[Named]) -> Html | None:
    accuracy = [Line(name, _curve(run, "val", "top1"), _style(i), dots=True) for i, (name, run) in enumerate(runs)]
    loss = [Line(name, _curve(run, "train", "loss"), _style(i)) for i, (name, run) in enumerate(runs)]
    top = max(run.num_images for _, run in runs)
    charts = []
    if values := _values(accuracy):
        y = axis(min(values), max(values))
        y = Axis(max(0.0, y.low), min(1.0, y.high), [t for t in y.ticks if -1e-9 <= t <= 1 + 1e-9])
        charts.append(line_chart("Val accuracy, %", accuracy, y, lambda v: f"{100 * v:.4g}", x_label="images trained on", x_top=top))
    if values := _values(loss):
        charts.append(line_chart("Train loss", loss, axis(0, max(values)), lambda v: f"{v:.4g}", x_label="images trained on", x_top=top))
    return el("section", el("h2", "Learning"), el("div", *charts, class_="pair")) if charts else None


def _curve(run: Run, kind: str, key: str) -> list[Point]:
    return thinned([(float(run.at(row) * run.recipe.batch), number(row, key)) for row in run.of_kind(kind)], _MOST_POINTS)


def _values(lines: Sequence[Line]) -> list[float]:
    return [y for line in lines for _, y in line.points if math.isfinite(y)]
