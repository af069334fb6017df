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

    A target with a queue records each submitted job by `launcher.jobs.keep`. `tltrain launch status` and `cancel` look up the latest
    record of a run folder, and call the functions of its target with the job's id.
    """

    usage: str
    """Arguments of `tltrain launch NAME` for the help text, one form a line."""
    main: Callable[[Sequence[str]], int]
    """(arguments after NAME): starts the runs and returns the exit code. Raises UserError."""
    state: Callable[[str], str] = _not_known
    """(job id): the job's state, as text for the user. Raises UserError."""
    cancel: Callable[[str], None] = _not_cancelled
    """(job id): makes its runs save and stop. Raises UserError."""
