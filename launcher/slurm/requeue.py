"""Decides whether a job is requeued after its processes end. Pure functions of the outcome, the signals and earlier requeues."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tltrain.runs.run_dir import OUT_OF_MEMORY

Action = Literal["finished", "requeue", "wait", "stopped", "failed"]
SECONDARY = re.compile(
    r"closed by peer|connection (was )?(reset|closed|refused)|broken pipe|timed? ?out|nccl|gloo|all_?reduce|socket", re.I
)


@dataclass(frozen=True)
class Ended:
    """How a start of a job ended."""

    outcome: Mapping[str, Any]
    """outcome.json as this start wrote it. Empty when it wrote none."""
    preempted: bool
    """The job script got SIGUSR2: a preemption, or the time limit is near."""
    terminated: bool
    """The job script got SIGTERM: the job is cancelled, or Slurm preempts and requeues it by itself."""
    slurm_preempts: bool = False
    """Slurm is ending the job to requeue it by itself."""


@dataclass(frozen=True)
class Limits:
    requeues: int
    crash_requeues: int


def decide(ended: Ended, past: Sequence[str], limits: Limits) -> tuple[Action, str]:
    """Returns (action, reason). `past` holds the reason of each earlier requeue, such as "preempted" or "crashed"."""
    outcome = ended.outcome.get("outcome")
    if outcome == "finished":
        return "finished", "the work is finished"
    if ended.slurm_preempts:
        return "wait", "Slurm preempts this job and requeues it by itself"
    if ended.terminated:
        return "stopped", "told to end by SIGTERM; saved work goes on when the same job is submitted again"
    if outcome == "stopped" and ended.outcome.get("signal") == OUT_OF_MEMORY:
        return "requeue", OUT_OF_MEMORY  # no limit: each start uses a smaller batch, so this ends soon
    preempted = ended.preempted or (outcome == "stopped" and ended.outcome.get("signal") == "SIGUSR2")
    if preempted:
        if len(past) >= limits.requeues:
            return "stopped", f"requeued {len(past)} times already, and max_requeues is {limits.requeues}; submit it again to go on"
        return "requeue", "preempted"
    if outcome == "stopped":
        return "stopped", f"stopped by {ended.outcome.get('signal')}; the same job submitted again goes on"
    crashes = past.count("crashed")
    if crashes < limits.crash_requeues:
        return "requeue", "crashed"
    return "failed", "the processes ended before the work was finished" + (f", requeued {crashes} times before" if crashes else "")


def first_failure(notes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The note of the process that failed first, or None without notes.

    Errors of lost connections follow from another process's failure, so they count only where there is no other note.
    """
    by_time = sorted(notes, key=lambda note: note["time"])
    causes = [note for note in by_time if "rank" in note and not SECONDARY.search(note["error"])]
    nodes = [note for note in by_time if "node" in note]
    return next(iter([*causes, *nodes, *by_time]), None)
