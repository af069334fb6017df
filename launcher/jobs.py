"""Records of submitted jobs, RUN/jobs/ID.json: the target of each job and its run folders."""

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
"""Allowed job ids. They start with a letter or digit, so that no queue command takes one for an option."""


@dataclass(frozen=True)
class KeptJob:
    """A submitted job, read from its record."""

    id: str
    target: str
    """Name of the target that the job was submitted to."""
    runs: tuple[Path, ...]
    """Run folders of the job: one, or one for each value of an array."""


def keep(place: Path, target: str, job: str, runs: Sequence[Training], **details: Any) -> None:
    """Write the record of a submitted job to PLACE/jobs/JOB.json.

    place: the run folder, or the folder that holds the runs of an array.
    details: further values for the record.
    Missing run folders are created with their recipe. A folder with a job record alone would not be recognised as a run folder.
    Raises UserError where a folder cannot be written.
    """
    for run in runs:
        run_dir.create(run.run, run.recipe)
    check_links(place)  # an array's folder is no run folder
    (place / "jobs").mkdir(exist_ok=True)
    values = {"job": job, "target": target, "time": time.time(), **details, "runs": [str(run.run) for run in runs]}
    files.write_json(place / "jobs" / f"{job}.json", values)


def latest(place: Path) -> KeptJob:
    """The job submitted last for a run folder, or for the folder of an array.

    The folder may come from somebody else, so its records are checked. Raises UserError for an invalid record, and where there is none.
    """
    records = [_read(path) for path in sorted((place / "jobs").glob("*.json"))]
    if not records:
        raise UserError(f"{place} has no job that `tltrain launch` submitted (jobs/*.json); look into the queue itself")
    return max(records, key=lambda each: each[0])[1]


def _read(path: Path) -> tuple[float, KeptJob]:
    """Returns (time of submission in seconds since the epoch, the job). Raises UserError for an invalid record."""
    values = untrusted.read_json(path)
    if not isinstance(values, dict):
        values = {}
    job, time_, runs = values.get("job"), values.get("time"), values.get("runs")
    target = values.get("target", "slurm")  # records of version 0.1.0 name no target: Slurm was the only one
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
