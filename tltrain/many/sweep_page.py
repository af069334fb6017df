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
from tltrain.runs.report.formatting import DASH, duration, interval, metric_name, metric_value, plural
from tltrain.runs.report.html import Html, el, join, page


def write(out: Path, rungs: Sequence[tuple[Rung | None, Standing]], headline: str, luck: str) -> None:
    """Write the page. rungs: in the order in which they were trained. Raises UserError."""
    title = f"{out.parent.name}, a sweep"
    sections = [_section(rung, standing, out) for rung, standing in reversed(rungs)]
    first = rungs[0][1].choices[0].runs[0].member
    num = sum(len(choice.runs) for _, standing in rungs for choice in standing.choices)
    about = f"{first.recipe.name} on {first.recipe.data.source}, over {' and '.join(first.values)}; {plural(num, 'run')}"
    header = el(
        "header", el("h1", title), el("div", about, class_="soft"), el("p", headline, class_="verdict"), el("p", luck) if luck else None
    )
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
    several = any(len(choice.runs) > 1 for choice in ranked)
    head = ["Run", *keys, f"Val {metric_name(standing.select)}", *(["Mean of seeds"] if several else []), "Time", "State"]
    rows = [_row(standing, choice, run, several, out) for choice in ranked for run in choice.runs]
    notes = ["In bold: the best."] if len(standing.ranked) > 1 else []
    if any(_ends(standing, run) is not None for choice in ranked for run in choice.runs):
        notes.append("Below a share of val images is its 95\u202f% interval (Wilson's), which counts the luck of these images alone.")
    if rung is not None and rung.part < 1:
        on = "one went on, and began" if rung.keep == 1 else f"{rung.keep} went on, and began"
        notes.append(f"Whole runs of a shortened recipe, with its schedule to its end. The best {on} anew.")
    note = el("p", " ".join(notes), class_="note") if notes else None
    return el("section", el("h2", heading), note, tables.table(head, rows, class_="wide"))


def _row(standing: Standing, choice: Choice, run: Ran, several: bool, out: Path) -> list[str]:
    report, name = run_dir.report_file(run.member.path), run.member.name
    link = el("a", name, href=escape.url(Path(os.path.relpath(report, out.parent)).as_posix())) if report.is_file() else name
    best = len(standing.ranked) > 1 and choice is standing.ranked[0]
    mean = _value(standing, choice.mean, best) if run is choice.runs[0] and len(choice.runs) > 1 else ""
    val = join(_value(standing, run.val, best and len(choice.runs) == 1), _ends(standing, run))
    return [link, *run.member.values.values(), val, *([mean] if several else []), duration(run.line.time), state_of(run.line)]


def _ends(standing: Standing, run: Ran) -> Html | None:
    """The interval of an accuracy on val. None for other metrics."""
    if standing.select != "top1" or math.isnan(run.val) or not run.num_val:
        return None
    return el("small", interval(run.val, run.num_val), class_="below")


def _value(standing: Standing, value: float, best: bool) -> str:
    text = DASH if math.isnan(value) else metric_value(standing.select, value)
    return el("b", text) if best else text
