"""`tltrain evaluate RUN --corruptions`: measures, and writes the folder `corruptions` of the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.core.output.console import Console
from tltrain.data.corruptions.views import CELLS, CLEAN, Cell
from tltrain.evaluation.results import report
from tltrain.evaluation.robustness import page, terminal
from tltrain.evaluation.robustness.asked import cells_of
from tltrain.evaluation.robustness.figures import Difference, Figures, differences, figures, table, unlike
from tltrain.evaluation.robustness.measure import Measurement, measure
from tltrain.runs import run_dir
from tltrain.runs.report.formatting import plural

PAGE, AGAINST_PAGE = "corruptions.html", "against.html"


@dataclass(frozen=True)
class Ask:
    """What `tltrain evaluate --corruptions` is asked."""

    run: Path
    corruptions: str
    severities: str
    against: Path | None
    source: str | None
    split: str
    batch: int


def corruptions(ask: Ask, as_json: bool) -> int:
    """Measure, write the pages, and print the tables. Returns the exit code. Raises UserError."""
    cells = cells_of(ask.corruptions, ask.severities)
    if ask.against is not None:
        run_dir.finished_weights(ask.against)  # refused before the first pass
        if ask.against.resolve() == ask.run.resolve():
            raise UserError(f"--against {ask.against} is the run itself; give another")
    console = Console(enabled=not as_json)
    first = _measured(ask, ask.run, cells, console)
    shown = figures(first.measured, cells)
    if first.is_main:
        _write(ask, first)
        console.show(terminal.table(shown))
        console.say(f"page    {first.measured.folder / PAGE}")
    value = {"clean": shown.clean, "mean": shown.overall.mean, "corruptions": _as_json(shown)}
    if ask.against is not None:
        value["against"] = _compare(ask, first, cells, console)
    if first.is_main and run_dir.report_file(ask.run).is_file():
        report(ask.run, console.say)  # which links to these pages
    if as_json and first.is_main:
        print(json.dumps(value, indent=1))
    return 0


def _measured(ask: Ask, run: Path, cells: Sequence[Cell], console: Console) -> Measurement:
    try:
        return measure(run, ask.source, ask.split, cells, ask.batch, console)
    except KeyboardInterrupt:
        console.busy(None)
        console.say(f"stopped {run}: the passes that are done are kept, and the same command goes on behind them")
        raise


def _write(ask: Ask, measurement: Measurement) -> None:
    """figures.csv, figures.json and the page, of all that has been measured so far."""
    measured = measurement.measured
    known = _whole(sorted(measured.predicted, key=CELLS.index))
    shown, folder, name = figures(measured, known), measured.folder, ask.run.resolve().name
    measured.write()
    files.write_atomic(folder / "figures.csv", table(measured, [cell for cell in CELLS if cell in measured.predicted]))
    value = {"about": measured.about, "clean": shown.clean, "mean": shown.overall.mean, "corruptions": _as_json(shown)}
    files.write_json(folder / "figures.json", value)
    right_N = np.flatnonzero(measured.right(CLEAN))
    example = measured.ids[int(right_N[0]) if len(right_N) else 0]
    seen = page.examples_of(measurement.views, measurement.views.split.ids.index(example), known)
    part = "of" if ask.split == "all" else f"from {ask.split} of"
    what = f"{plural(len(measured.ids), 'image')} {part} {measured.about['source']}, {measured.about['size']} pixels"
    files.write_atomic(folder / PAGE, _bytes(page.corruptions_page(name, what, shown, seen)))
    measured.seal()


def _whole(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of the severities that every one of their corruptions has: means over other ones would not be comparable."""
    names = {cell.name for cell in cells if cell != CLEAN}
    common = {s for s in {cell.severity for cell in cells} if s and all(Cell(name, s) in cells for name in names)}
    if not common:  # such as noise in severity 1, and blur in 3: the corruptions with the most severities
        most = max(names, key=lambda name: sum(cell.name == name for cell in cells))
        return [cell for cell in cells if cell.name in (most, CLEAN.name)]
    return [cell for cell in cells if cell == CLEAN or cell.severity in common]


def _compare(ask: Ask, first: Measurement, cells: Sequence[Cell], console: Console) -> list[dict[str, Any]]:
    assert ask.against is not None
    second = _measured(ask, ask.against, cells, console)
    rows = differences(first.measured, second.measured, cells)
    names, other = _names(ask.run, ask.against), unlike(first.measured, second.measured)
    several = first.measured.several
    if first.is_main:
        second.measured.seal()
        path = first.measured.folder / AGAINST_PAGE
        files.write_atomic(path, _bytes(page.against_page(names, rows, len(first.measured.ids), other, several)))
        first.measured.seal()
        if other:
            console.say(f"note    the corrupted pixels of the two are not the same: {other}", style="yellow")
        console.show(terminal.differences(rows, *names, several))
        console.show(escape.line(page.against_verdict(names, rows, several)))
        console.say(f"page    {path}")
    return [_difference(row) for row in rows]


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The folders' names, or where they are the same, their paths as they were given."""
    one, other = first.resolve().name, second.resolve().name
    return (one, other) if one != other else (str(first), str(second))


def _difference(row: Difference) -> dict[str, Any]:
    return {"corruption": row.name, "first": row.first, "second": row.second, "difference": row.gain, "p": row.p}


def _as_json(shown: Figures) -> dict[str, Any]:
    return {row.name: {"mean": row.mean, "by_severity": row.by_severity} for row in shown.rows}


def _bytes(text: str) -> bytes:
    """Names that are not valid UTF-8 get question marks, as on a run's page."""
    return text.encode("utf-8", errors="replace")
