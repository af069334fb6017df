"""The page of `tltrain ls`: all runs, with rows that can be filtered by recipe, data and state, without a script."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tltrain.core.output import escape
from tltrain.runs import run_dir
from tltrain.runs.listing.lines import RunLine
from tltrain.runs.listing.words import ago, data_name, state_of
from tltrain.runs.report.formatting import duration, ends, percent, plural
from tltrain.runs.report.html import Html, el, join, page

_COLUMNS = {"Run": "t", "Recipe": "", "Data": "", "State": "", "Val": "n", "Test": "n", "Time": "n", "When": "n"}
"""Heading to class of the page's style sheet: t stays in sight when the table is moved aside, n is a number."""
_FILTERS = ("recipe", "data", "state")
_MOST_CHOICES = 24
_STYLE = """
.filters { border: 0; margin: 0 0 10px; padding: 0; font-size: 14px; }
.filters legend { float: left; color: var(--soft); width: 4.5em; padding: 0; }
.filters div { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; }
.filters label { white-space: nowrap; }
.filters input { margin: 0 5px 0 0; accent-color: var(--c0); }
@media print { .filters { display: none; } }
"""


def listing(lines: Sequence[RunLine], root: Path, out: Path, now: float) -> str:
    """The HTML page. Links to the runs' own reports are relative to `out`. now: seconds since the epoch."""
    choices = {name: _choices(lines, name) for name in _FILTERS}
    finished = sum(line.state == "finished" for line in lines)
    rules = "".join(_rule(name, i) for name, values in choices.items() for i in range(len(values)))
    shown = root if root.name else root.resolve()  # of `.`, which names nothing
    head = el("tr", *(el("th", name, scope="col", class_=kind) for name, kind in _COLUMNS.items()))
    rows = [_row(line, root, out, now, choices) for line in lines]
    return page(
        f"Runs in {shown}",
        el("style", Html(_STYLE + rules)),
        el("header", el("h1", f"Runs in {shown}"), el("p", f"{plural(len(lines), 'run')}, {finished} finished", class_="verdict")),
        *(_filter(name, values) for name, values in choices.items()),
        el("div", el("table", el("thead", head), el("tbody", *rows)), class_="scroll wide"),
        el(
            "p",
            "Val and test are accuracies (top-1; of several labels: all right). Val is that of the weights that the run hands on. Below "
            "test is its 95\u202f% interval, which counts the luck of these test images.",
            class_="note under",
        ),
    )


def _choices(lines: Sequence[RunLine], name: str) -> list[str]:
    """The values of a filter; none where there is nothing to choose."""
    values = sorted({getattr(line, name) for line in lines})
    return values if 1 < len(values) <= _MOST_CHOICES else []


def _rule(name: str, index: int) -> str:
    return f"body:has(#{name}-{index}:checked) tbody tr:not(.{name}-{index}) {{ display: none; }}\n"


def _filter(name: str, values: Sequence[str]) -> Html | None:
    if not values:
        return None
    shown = [data_name(text) for text in values] if name == "data" else values
    shown = shown if len(set(shown)) == len(values) else values  # two folders of one name
    buttons = [_button(name, "all", "all", checked=True), *(_button(name, str(i), text or "?") for i, text in enumerate(shown))]
    return el("fieldset", el("legend", name), el("div", *buttons), class_="filters")


def _button(name: str, index: str, text: str, checked: bool = False) -> Html:
    return el("label", Html(f'<input type="radio" name="{name}" id="{name}-{index}"{" checked" if checked else ""}>'), text)


def _row(line: RunLine, root: Path, out: Path, now: float, choices: Mapping[str, list[str]]) -> Html:
    path = Path(line.run)
    report = run_dir.report_file(path)
    name = os.path.relpath(path, root) if path != root else path.name
    first: str = name
    if report.is_file():
        first = el("a", name, href=escape.url(Path(os.path.relpath(report, out.parent)).as_posix()))
    state = join(state_of(line), el("small", line.problem, class_="below") if line.problem else None)
    interval = el("small", ends(*line.test_interval), class_="below") if line.test_interval else None
    figures = [percent(line.val), join(percent(line.test), interval), duration(line.time), ago(line.when, now)]
    cells = zip([first, line.recipe, data_name(line.data), state, *figures], _COLUMNS.values(), strict=True)
    marks = " ".join(f"{name}-{values.index(getattr(line, name))}" for name, values in choices.items() if values)
    return el("tr", *(el("td", text, class_=kind) for text, kind in cells), class_=marks)
