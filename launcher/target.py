"""The Target type: a place where `tltrain launch NAME` starts runs, such as this machine or Slurm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tltrain.core.errors import UserError


def _not_known(job: str) -> str:
    return "not known here"


def _not_cancelled(job: str) -> None:
    raise UserError(f"job {job} cannot be cancelled from here; stop it where it runs")


@dataclass(frozen=True)
class Target:
    """The functions of one place to run.

    A target that hands its runs to a queue keeps each job by `launcher.jobs.keep`. `tltrain launch status` and `cancel` find the target
    of a run folder's latest job there, and ask it by the job's id.
    """

    usage: str
    """What may stand behind `tltrain launch NAME`, one form a line."""
    main: Callable[[Sequence[str]], int]
    """(the words behind NAME): starts the runs, and returns the exit code. Raises UserError."""
    state: Callable[[str], str] = _not_known
    """(job): its state, for a person."""
    cancel: Callable[[str], None] = _not_cancelled
    """(job): lets its runs save and stop. Raises UserError."""
