"""Writes report.html of a run, and a page that compares several runs. Pages are self-contained and have no scripts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.runs import run_dir
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.pages.compare_page import comparison
from tltrain.runs.pages.comparison import ComparedRun, compared_run
from tltrain.runs.pages.run_page import report
from tltrain.runs.record import read_run
from tltrain.runs.report.html import Html, el, join

__all__ = ["read_rows", "write_comparison", "write_entries", "write_report"]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run, finished or not, to `out` (default: RUN/report.html). Returns its path.

    Raises UserError if the run cannot be read or the page cannot be written.
    """
    out = out or run_dir.report_file(run)
    _write(out, report(read_run(run), links_beside(run, out)))
    return out


BESIDE = (
    ("corruptions*/corruptions.html", "under corruptions"),
    ("corruptions*/against.html", "under corruptions, against another run"),
    ("../folds.html", "the cross-validation"),
    ("../sweep.html", "the sweep"),
    ("../comparison.html", "the comparison"),
    ("../index.html", "the comparison"),
)
"""Pages that other verbs write into a run folder, or into the one above it: where they lie, and what they are called in a report."""


def links_beside(run: Path, out: Path) -> Html | None:
    """Links from a report at `out` to the other pages of its run that are there. None without any."""
    links = []
    for pattern, name in BESIDE:
        above = pattern.startswith("../")
        folder = run.absolute().parent if above else run.absolute()
        for place in sorted(folder.glob(pattern.removeprefix("../"))):
            of = "" if above else place.parent.name.removeprefix("corruptions").strip("-")  # of other images than the run's own test
            where = Path(os.path.relpath(place, out.absolute().parent)).as_posix()
            links.append(el("a", f"{name} ({of})" if of else name, href=escape.url(where)))
    if not links:
        return None
    return el("p", "See also: ", *(join(", " if i else "", link) for i, link in enumerate(links)), ".", class_="under")


def write_comparison(runs: Sequence[Path], out: Path, title: str, lead: str = "", names: Sequence[str] | None = None) -> Path:
    """Write a page to `out` that compares runs on the same test images. Returns `out`.

    names: the name of each run on the page; None uses the names of the folders.
    Raises UserError if a run cannot be read or the page cannot be written.
    """
    shown = [run.resolve().name for run in runs] if names is None else list(names)
    entries = [compared_run(name, read_run(run)) for name, run in zip(shown, runs, strict=True)]
    return write_entries(entries, out, title, lead)


def write_entries(entries: Sequence[ComparedRun], out: Path, title: str, lead: str = "") -> Path:
    """Like `write_comparison`, for runs that are already read."""
    _write(out, comparison(entries, out, title, lead))
    return out


def _write(out: Path, text: str) -> None:
    """Class names may come from file names that are not valid UTF-8. Invalid characters become question marks."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(out, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another place with --out") from error
