"""sweep.html: what a sweep has chosen, how much of its lead is luck, and every run of every rung."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.many.grid import Rung
from tltrain.many.standing import Choice, Ran, Standing
from tltrain.runs import run_dir
from tltrain.runs.listing.words import state_of
from tltrain.runs.report import tables
from tltrain.runs.report.formatting import DASH, duration, metric_name, metric_value
from tltrain.runs.report.html import Html, el, page


def write(out: Path, rungs: Sequence[tuple[Rung | None, Standing]], headline: str, luck: str) -> None:
    """Write the page. rungs: in the order in which they were trained. Raises UserError."""
    title = f"Sweep {out.parent.name}"
    sections = [_section(rung, standing, out) for rung, standing in reversed(rungs)]
    header = el("header", el("h1", title), el("p", headline, class_="verdict"), el("p", luck) if luck else None)
    text = page(title, header, *sections)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(out, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another place with --folder") from error


def _section(rung: Rung | None, standing: Standing, out: Path) -> Html:
    ranked = [*standing.ranked, *(choice for choice in standing.choices if choice not in standing.ranked)]
    heading = "Runs" if rung is None else "At full length" if rung.part == 1 else f"At {rung.part} of the length"
    keys = list(ranked[0].runs[0].member.values)
    head = ["Run", *keys, f"Val {metric_name(standing.select)}", "Mean of seeds", "Time", "State"]
    rows = [_row(standing, choice, run, first=run is choice.runs[0], out=out) for choice in ranked for run in choice.runs]
    note = None
    if rung is not None and rung.part < 1:
        note = f"Whole runs of a shortened recipe, with its schedule to its end. The best {rung.keep} went on, and began anew."
    return el("section", el("h2", heading), el("p", note, class_="note") if note else None, tables.table(head, rows, class_="wide"))


def _row(standing: Standing, choice: Choice, run: Ran, first: bool, out: Path) -> list[str]:
    report, name = run_dir.report_file(run.member.path), run.member.name
    link = el("a", name, href=escape.url(Path(os.path.relpath(report, out.parent)).as_posix())) if report.is_file() else name
    mean = _value(standing, choice.mean) if first and len(choice.runs) > 1 else ""
    values = [value for value in run.member.values.values()]
    return [link, *values, _value(standing, run.val), mean, duration(run.line.time), state_of(run.line)]


def _value(standing: Standing, value: float) -> str:
    return DASH if math.isnan(value) else metric_value(standing.select, value)
