"""The jobs of a run folder, as they are kept in jobs/ID.json: which target has them, and which runs they are."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.command import Training
from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.runs import run_dir


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
    (place / "jobs").mkdir(exist_ok=True)
    values = {"job": job, "target": target, "time": time.time(), **details, "runs": [str(run.run) for run in runs]}
    files.write_json(place / "jobs" / f"{job}.json", values)


def latest(place: Path) -> KeptJob:
    """The job of a run folder, or of an array's, that was submitted last. Raises UserError where the launcher submitted none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (place / "jobs").glob("*.json")]
    if not found:
        raise UserError(f"{place} has no job that `tltrain launch` submitted (jobs/*.json); look into the queue itself")
    values = max(found, key=lambda each: float(each["time"]))
    return KeptJob(values["job"], values.get("target", "slurm"), tuple(map(Path, values["runs"])))  # 0.1.0 knew no other queue
