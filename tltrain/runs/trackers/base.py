"""The interface of a tracker: it receives the events of a run and shows them outside the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tltrain.core.flags import RunFlags


@dataclass(frozen=True)
class TrackedRun:
    """The description of a run that a tracker gets before the first row."""

    path: Path
    """The run folder. A tracker writes its own files into it and nowhere else."""
    name: str
    """The folder's name."""
    recipe: Mapping[str, Any]
    """The recipe as plain data."""
    stage_steps: Sequence[int]
    """Planned optimizer steps of each stage."""
    flags: RunFlags
    """The start-up flags of this start."""
    say: Callable[[str], None]
    """Prints a line to the person who started the run."""


class RunTracker:
    """Base class whose methods do nothing. A tracker overrides those that it needs.

    `tltrain.runs.trackers.Trackers` creates one for each start of a run, on the main process, and calls all its methods on one thread.
    A method may raise anything: the error is printed once, only `close` is called after it, and the run goes on.
    """

    packages: ClassVar[Sequence[str]] = ()
    """Top-level packages without which it cannot work. A missing one is said before the first step."""

    def open(self, run: TrackedRun) -> None:
        """A start of a run begins. A resumed run has several. State that must outlive a start belongs in run.path."""

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics-*.jsonl: kind (teacher, train, val, stage_end, test), stage, stage_index, step (within the stage), run_step,
        epoch, and metrics. After a resume, rows after the checkpoint come a second time: `read_rows(run.path)` has those that stand."""

    def plan(self, text: str) -> None:
        """The text of plan.txt."""

    def preview(self, path: Path) -> None:
        """The image file preview.png: training images as the network sees them."""

    def confusion(self, matrix: list[list[int]], classes: list[str]) -> None:
        """The confusion matrix of the test: a row for each actual class, a column for each predicted one."""

    def mistakes(self, items: Sequence[Mapping[str, Any]]) -> None:
        """The most confident mistakes on the test split, as in mistakes.json: id, png (base64), label, predicted, confidence."""

    def summary(self, values: dict[str, Any]) -> None:
        """Metrics of the whole run, such as test/top1."""

    def weights(self, weights: Path, name: str, teacher: tuple[Path, str] | None = None) -> None:
        """The best weights of a finished run, and the recipe's name. teacher: the same two values, if the teacher is a tltrain run."""

    def report(self, page: Path) -> None:
        """The page report.html of a finished run. It holds its pictures."""

    def close(self) -> None:
        """This start of the run ends, finished or not. Also called after another method has raised."""
