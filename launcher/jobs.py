"""The jobs of a run folder, as they are kept in jobs/ID.json: which target has them, and which runs they are."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.command import Training
from tltrain.core import files, untrusted
from tltrain.core.errors import UserError
from tltrain.runs import run_dir
from tltrain.runs.links import check_links

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@+-]*")
"""What a job may be called: never what a queue's command would take for one of its options."""


@dataclass(frozen=True)
class KeptJob:
    """A job as the launcher wrote it down."""

    id: str
    target: str
    """The name of the target that it was submitted to."""
    runs: tuple[Path, ...]
    """Its run folders: one, or one for each value of an array."""


def keep(place: Path, target: str, job: str, runs: Sequence[Training], **details: Any) -> None:
    """Write a submitted job down.

    place: the run folder, or the folder that holds the runs of an array. Run folders that are not there yet are made: a job's record alone
    would make them look like anybody's folder. Raises UserError where they cannot be written.
    """
    for run in runs:
        run_dir.create(run.run, run.recipe)
    check_links(place)  # an array's folder is no run folder
    (place / "jobs").mkdir(exist_ok=True)
    values = {"job": job, "target": target, "time": time.time(), **details, "runs": [str(run.run) for run in runs]}
    files.write_json(place / "jobs" / f"{job}.json", values)


def latest(place: Path) -> KeptJob:
    """The job of a run folder, or of an array's, that was submitted last. Raises UserError where the launcher submitted none, and for a
    record that it did not write: the folder may be anybody's."""
    found = [_read(path) for path in sorted((place / "jobs").glob("*.json"))]
    if not found:
        raise UserError(f"{place} has no job that `tltrain launch` submitted (jobs/*.json); look into the queue itself")
    return max(found, key=lambda each: each[0])[1]


def _read(path: Path) -> tuple[float, KeptJob]:
    """(when it was submitted, the job). Raises UserError."""
    values = untrusted.read_json(path)
    if not isinstance(values, dict):
        values = {}
    job, time_, runs = values.get("job"), values.get("time"), values.get("runs")
    target = values.get("target", "slurm")  # 0.1.0 knew no other queue
    if not isinstance(job, str) or ID.fullmatch(job) is None:
        raise _not_ours(path, "job", job)
    if not isinstance(time_, int | float) or isinstance(time_, bool) or not math.isfinite(time_):
        raise _not_ours(path, "time", time_)
    if not isinstance(runs, list) or not all(isinstance(run, str) for run in runs):
        raise _not_ours(path, "runs", runs)
    if not isinstance(target, str):
        raise _not_ours(path, "target", target)
    return float(time_), KeptJob(job, target, tuple(map(Path, runs)))


def _not_ours(path: Path, key: str, value: object) -> UserError:
    return UserError(
        f"{path} is no record of a job that `tltrain launch` wrote: {key} is {untrusted.cut(value)}; delete it, and stop the job by the "
        "queue's own command"
    )
