"""What a tracker is: something outside the run folder that is told what happens in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tltrain.core.flags import RunFlags


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of a run before its first row."""

    path: Path
    """The run folder. Whatever a tracker writes to disk belongs in it."""
    name: str
    """The folder's name."""
    recipe: Mapping[str, Any]
    """The recipe's values, as plain data."""
    stage_steps: Sequence[int]
    """Planned optimizer steps of each stage."""
    flags: RunFlags
    """The start-up flags of this start."""
    say: Callable[[str], None]
    """Prints a line to the person who started the run."""


class RunTracker:
    """A tracker overrides what it cares about; here nothing is done with anything.

    `tltrain.runs.trackers.Trackers` makes one for each start of a run, on the main process, and calls all its methods on one thread.
    They may raise whatever they like: it is said once, the tracker is then told nothing more but `close`, and the run goes on.
    """

    def open(self, run: TrackedRun) -> None:
        """A start of a run begins; a run that is resumed has several. What a tracker must remember between them stands in run.path."""

    def log(self, row: dict[str, Any]) -> None:
        """A row as it stands in metrics-*.jsonl: kind (teacher, train, val, stage_end, test), stage, stage_index, step (within the stage),
        run_step, epoch, and figures. After a resume, rows behind the checkpoint come a second time."""

    def plan(self, text: str) -> None:
        """plan.txt, as it is printed."""

    def preview(self, path: Path) -> None:
        """The picture of what the network sees."""

    def confusion(self, matrix: list[list[int]], classes: list[str]) -> None:
        """The test's confusion matrix: a row for each actual class, a column for each predicted one."""

    def mistakes(self, items: Sequence[Mapping[str, Any]]) -> None:
        """The most confident mistakes on the test split, as in mistakes.json: id, png (base64), label, predicted, confidence."""

    def summary(self, values: dict[str, Any]) -> None:
        """Figures of the whole run, such as test/top1."""

    def weights(self, weights: Path, name: str, teacher: tuple[Path, str] | None = None) -> None:
        """The best weights of a finished run, and the recipe's name. teacher: the same two of a teacher that is a run of ours."""

    def close(self) -> None:
        """This start of the run ends, finished or not. It is also called where another method has raised."""
