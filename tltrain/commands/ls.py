"""`tltrain ls`: the runs below a folder as a table on the terminal, as JSON, or as a page."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.core.output.console import Terminal
from tltrain.runs.listing.lines import RunLine, lines
from tltrain.runs.listing.page import listing
from tltrain.runs.listing.words import ago, cut, data_name, short_duration, state_of

_LEAST = {"data": 8, "recipe": 12, "run": 12}
"""Columns that are cut where a terminal is too narrow, in this order, and the width that each keeps."""
_INTERVAL = "95 %"
_BESIDE_INTERVAL = {"data": 12, "recipe": 16, "run": 20}
"""Widths down to which names are cut for the interval of the test. Where that is not enough, the interval is left out."""


def show(root: Path, sort: str, as_json: bool, out: Path | None) -> int:
    """Print the runs below a folder, or write their page to `out`. Returns the exit code. Raises UserError."""
    if root == Path("runs") and not root.exists():
        print("no runs yet in runs; `tltrain train` or `tltrain demo` makes one")
        return 0
    found = lines(root, sort)
    if as_json:
        print(json.dumps([line.plain() for line in found], indent=1))
        return 0
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(out, listing(found, root, out, time.time()).encode("utf-8", errors="replace"))
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}; give another place with --out") from error
        print(escape.line(f"page    {out}"))
        return 0
    terminal = Terminal(highlight=False)
    for text in table(found, root, time.time(), terminal.width):
        terminal.print(text, markup=False, soft_wrap=True)
    return 0


def table(found: Sequence[RunLine], root: Path, now: float, width: int) -> list[str]:
    """The lines of the table, none wider than `width`. now: seconds since the epoch."""
    if not found:
        return [f"no runs in {root}"]
    columns = _columns(found, root, now)
    if all(recipe in (Path(name).name, "") for name, recipe in zip(columns["run"], columns["recipe"], strict=True)):
        del columns["recipe"]  # every run is called after its recipe
    if _alike_if_cut({name: cells for name, cells in columns.items() if name != _INTERVAL}, width):
        columns.pop("recipe", None)  # a run's name says more
    head = [_same(columns, name) for name in ("recipe", "data")]
    widths = _widths(columns)
    least = {name: min(w, _BESIDE_INTERVAL.get(name, w)) for name, w in widths.items()}
    if not any(columns[_INTERVAL]) or _row_width(least) > width or _alike_if_cut(columns, width):
        del columns[_INTERVAL], widths[_INTERVAL]
    _narrow(widths, width)
    numbers = ("val", "test", _INTERVAL, "time")

    def row(cells: dict[str, str]) -> str:
        shown = [cut(c, widths[n]).rjust(widths[n]) if n in numbers else cut(c, widths[n]).ljust(widths[n]) for n, c in cells.items()]
        return "  ".join(shown).rstrip()

    rows = [row({name: cells[i] for name, cells in columns.items()}) for i in range(len(found))]
    damaged = [(columns["run"][i], line.problem) for i, line in enumerate(found) if line.problem]
    notes = [cut_end(f"{name}: {escape.line(problem)}", width) for name, problem in damaged]
    return [*filter(None, head), row({name: name for name in columns}), *rows, *([""] if notes else []), *notes]


def _alike_if_cut(columns: dict[str, list[str]], width: int) -> bool:
    """Whether runs, cut for so narrow a terminal, would be called alike, as sw/s~.lr-1e-3 for each seed of a sweep."""
    widths = _widths(columns)
    _narrow(widths, width)
    return len({cut(name, widths["run"]) for name in columns["run"]}) < len(columns["run"])


def _same(columns: dict[str, list[str]], name: str) -> str:
    """Where every run has the same recipe, or data: a line that says so in place of the column. Else an empty one."""
    if name not in columns or len(columns[name]) < 2 or len(set(columns[name])) > 1:
        return ""
    return f"{name:8}{columns.pop(name)[0]}"


def cut_end(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "\u2026"


def _columns(found: Sequence[RunLine], root: Path, now: float) -> dict[str, list[str]]:
    names = [os.path.relpath(line.run, root) if Path(line.run) != root else line.run for line in found]
    return {
        "run": [escape.line(name) for name in names],
        "recipe": [escape.line(line.recipe) for line in found],
        "data": [escape.line(data_name(line.data)) for line in found],
        "state": [escape.line(state_of(line)) for line in found],
        "val": [_percent(line.val) for line in found],
        "test": [_percent(line.test) for line in found],
        _INTERVAL: [" to ".join(map(_percent, line.test_interval or ())) for line in found],
        "time": [short_duration(line.time) for line in found],
        "when": [ago(line.when, now) for line in found],
    }


def _percent(share: float) -> str:
    return "" if share != share else f"{100 * share:.1f}"


def _widths(columns: dict[str, list[str]]) -> dict[str, int]:
    return {name: max(len(name), *map(len, cells)) for name, cells in columns.items()}


def _row_width(widths: dict[str, int]) -> int:
    return sum(widths.values()) + 2 * (len(widths) - 1)


def _narrow(widths: dict[str, int], width: int) -> None:
    """Make the columns of names narrower, the widest first, until a row fits."""
    while _row_width(widths) > width:
        wide = [name for name, least in _LEAST.items() if widths.get(name, 0) > least]
        if not wide:
            return
        widths[wide[0]] -= 1
