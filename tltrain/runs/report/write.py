"""report.html of a run, and one page that compares several: self-contained, without scripts, from the run folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.runs import run_dir
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.record import read_run
from tltrain.runs.report.compare_page import comparison
from tltrain.runs.report.comparison import ComparedRun, compared_run
from tltrain.runs.report.run_page import report

__all__ = ["read_rows", "write_comparison", "write_entries", "write_report"]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write a report of what a run folder holds, however far the run came, to `out` or RUN/report.html; returns its path.

    Raises UserError.
    """
    out = out or run_dir.report_file(run)
    _write(out, report(read_run(run)))
    return out


def write_comparison(runs: Sequence[Path], out: Path, title: str, lead: str = "", names: Sequence[str] | None = None) -> Path:
    """Write one page to `out` that compares runs on the same test images; returns `out`. Raises UserError.

    names: what to call each run; None calls it by its folder's name.
    """
    called = [run.resolve().name for run in runs] if names is None else list(names)
    entries = [compared_run(name, read_run(run)) for name, run in zip(called, runs, strict=True)]
    return write_entries(entries, out, title, lead)


def write_entries(entries: Sequence[ComparedRun], out: Path, title: str, lead: str = "") -> Path:
    """As `write_comparison`, of runs that are read already."""
    _write(out, comparison(entries, out, title, lead))
    return out


def _write(out: Path, text: str) -> None:
    """Class names may come from file names that are no UTF-8: what cannot be written shows as a question mark."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(out, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another place with --out") from error
