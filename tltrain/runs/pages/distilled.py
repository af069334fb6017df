"""A student against its teacher: what `tltrain distil` keeps in the run folder, as lines of the terminal and as a section of the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tltrain.core.errors import UserError
from tltrain.core.output.console import size
from tltrain.runs import manifest
from tltrain.runs.record import RunRecord
from tltrain.runs.report import tables as parts
from tltrain.runs.report.formatting import DASH, count, percent, signed
from tltrain.runs.report.html import Html, el

NAME = "distilled.json"
WHO = ("teacher", "student")


def read(run: Path) -> dict[str, Any] | None:
    """The contents of distilled.json. None for runs without it. Raises UserError for a damaged file."""
    found: dict[str, Any] | None = manifest.read_json(run / NAME, dict, (*WHO, "runs"))
    if found is None:
        return None
    try:
        _rows(found), said(found)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run / NAME} is damaged ({type(error).__name__}: {error}); delete it, and run tltrain distil again") from error
    return found


def section(run: RunRecord) -> Html | None:
    """The section of the page. None for a run that `tltrain distil` did not make."""
    found = read(run.path)
    if found is None:
        return None
    of = f"Its teacher is {found['runs'][0]}" + (f" and {len(found['runs']) - 1} more, together." if len(found["runs"]) > 1 else ".")
    text = said(found)
    head = ["", "Test mAP" if "student_map" in found else "Test accuracy", "95\u202f%", "Parameters", "Bytes", "ms an image"]
    note = f"ms an image: the network's part, in batches, on the machine that trained it ({found['student']['device']})."
    return el(
        "section", el("h2", "Student and teacher"), el("p", f"{text[0].upper()}{text[1:]}.") if text else None, el("p", of, class_="note"),
        parts.table(head, [[who.capitalize(), *row] for who, row in _rows(found).items()]), el("p", note, class_="note under"),
    )  # fmt: skip


def lines(found: Mapping[str, Any]) -> list[str]:
    """For the terminal."""
    of = "mAP " if "student_map" in found else ""
    rows = [
        f"{who:7} {of}{top1} ({between}), {parameters} parameters, {num_bytes}, {ms} ms an image" if top1 != DASH else
        f"{who:7} {parameters} parameters, {num_bytes}, {ms} ms an image"
        for who, (top1, between, parameters, num_bytes, ms) in _rows(found).items()
    ]  # fmt: skip
    return [*rows, *([f"against {said(found)}"] if said(found) else [])]


def said(found: Mapping[str, Any]) -> str:
    """The difference as a sentence. Empty without a test."""
    if "gain" not in found:
        return ""
    value, low, high = (float(share) for share in found["gain"])
    luck = "" if low > 0 or high < 0 else "; it may be luck"
    differs = f"{100 * abs(value):.1f} points {'more' if value > 0 else 'less'} than" if value else "as often as"
    of = f"on the same {count(int(found['n']))} test images"
    head = f"the student is right {differs} its teacher"
    if "student_map" in found:
        differs = f"{100 * abs(value):.1f} points {'above' if value > 0 else 'below'}" if value else "the same as"
        head = f"the student's mean average precision is {differs} its teacher's"
    return f"{head} {of} (95\u202f%: {signed(low)} to {signed(high)} points{luck if value else ''})"


def _rows(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Teacher and student, each with accuracy, or of several labels mAP, its interval, parameters, bytes and ms, as text."""
    rows = {}
    for who in WHO:
        of, top1, between = found[who], DASH, DASH
        if (figure := next((found[key] for key in (f"{who}_top1", f"{who}_map") if key in found), None)) is not None:
            share, low, high = (float(value) for value in figure)
            top1, between = percent(share), f"{100 * low:.1f} to {100 * high:.1f} %"
        rows[who] = [top1, between, count(int(of["parameters"])), size(float(of["bytes"])), f"{float(of['ms']):.2f}"]
    return rows
