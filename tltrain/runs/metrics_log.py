"""metrics-*.jsonl: the log of a run, one JSON object for each row.

Each row is flushed when it is written, so the log can be read after a crash. Trackers (`tltrain.runs.trackers`) receive the same rows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.runs import manifest, run_dir
from tltrain.runs.links import append_only

KIND_ORDER = {"teacher": -1, "train": 0, "solve": 0, "val": 1, "blend": 2, "stage_end": 2, "test": 3}
"""Kinds of rows, in the order in which they are written within one step."""


class MetricsLog:
    """Writes the rows of one start of a run."""

    def __init__(self, run: Path, generation: int, start: dict[str, Any]) -> None:
        """start: {"from": [stage, step, evaluated] or None}, and further values that describe this start."""
        self.file = append_only(run_dir.metrics_file(run, generation))
        self.log({"kind": "start", "generation": generation, **start})

    def log(self, row: dict[str, Any]) -> None:
        """Append a row with the current time."""
        self.file.write(json.dumps({**row, "time": time.time()}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Sync the rows to disk. Raises UserError if that fails; while another exception propagates, it prints the problem instead."""
        propagating = sys.exc_info()[1]
        try:
            with self.file:
                os.fsync(self.file.fileno())
        except OSError as error:
            text = f"the last rows of {self.file.name} may not be on the disk: {error}"
            if propagating is None:
                raise UserError(f"{text}. Make room; the other files of the run are safe") from error
            sys.stderr.write(f"tltrain: {text}\n")


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run over all its starts, each position once.

    A start that resumed from a checkpoint repeats the steps after that checkpoint, so the earlier start's rows of those steps are dropped.
    A last line that a crash cut short is dropped too.
    """
    rows: list[dict[str, Any]] = []
    for path in run_dir.metrics_files(run):
        new = _read(path)
        origin = next((row.get("from") for row in new if row["kind"] == "start"), None)
        begin = tuple(origin) if origin else (-1, 0, 0)
        rows = [row for row in rows if row["kind"] == "start" or _position(row) <= begin] + new
    return [row for row in rows if row["kind"] != "start"]


def _position(row: dict[str, Any]) -> tuple[int, int, int]:
    if row["kind"] == "teacher":
        return (0, 0, -1)
    if row["kind"] == "test":  # after the checkpoint at the end of the last stage
        return (row["stage_index"] + 1, 0, KIND_ORDER["test"])
    return (row["stage_index"], row["step"], KIND_ORDER[row["kind"]])


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of one file. Raises UserError, with the line, for one that is no row: only the last may have been cut short."""
    manifest.check(path)
    rows = []
    try:
        lines = files.read_bytes(path).splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}; copy it from a backup, or delete it to go on without its rows") from error
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_checked(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: it is damaged, and no row of metrics ({error}); copy the file from a backup, or delete the line"
            ) from error
    return rows


def _checked(row: Any) -> dict[str, Any]:
    """The same. Raises ValueError, KeyError or TypeError where it has no place in a run."""
    if row["kind"] != "start":
        _position(row)
    elif row.get("from") is not None and not all(isinstance(n, int) for n in row["from"]):
        raise ValueError("from is no position")
    return dict(row)
