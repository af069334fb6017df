"""Tells trackers what happens in a run. This is the one place that calls them, and what goes wrong in them ends here.

The rows in the run folder are the truth; a tracker shows them elsewhere and can neither stop a run nor hold it up for long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from tltrain.core import registry
from tltrain.core.flags import RunFlags
from tltrain.runs.trackers.base import RunTracker, TrackedRun

__all__ = ["RunTracker", "TrackedRun", "Trackers", "chosen"]

ANSWER_S = 60.0
"""Longest wait for a tracker while the run goes on, seconds. Opening one may import a large client from a slow disk."""
UPLOAD_S = 300.0
"""Longest wait for a tracker's server at the end of a run, seconds."""

Make = Callable[[], RunTracker]


def chosen(flags: RunFlags) -> dict[str, Make]:
    """Name to class of the trackers that the flags ask for, imported. Raises UserError for one that is unknown or cannot be imported."""
    names = dict.fromkeys([*([] if flags.wandb == "disabled" else ["wandb"]), *flags.trackers])
    return {name: registry.find("trackers", name, f"--trackers has {name!r}") for name in names}


class Trackers(RunTracker):
    """All trackers of one start of a run, as one that never raises."""

    def __init__(self, classes: Mapping[str, Make], say: Callable[[str], None], answer_s: float = ANSWER_S) -> None:
        """answer_s: longest wait for an answer of each while the run goes on, seconds."""
        self.answer_s = answer_s
        self.guarded = [_Guarded(name, make, say) for name, make in classes.items()]

    def __len__(self) -> int:
        return len(self.guarded)

    def open(self, run: TrackedRun) -> None:
        self._tell(lambda tracker: tracker.open(run))

    def log(self, row: dict[str, Any]) -> None:
        self._tell(lambda tracker: tracker.log(dict(row)))  # each has its own: the run still uses this one

    def plan(self, text: str) -> None:
        self._tell(lambda tracker: tracker.plan(text))

    def preview(self, path: Path) -> None:
        self._tell(lambda tracker: tracker.preview(path))

    def confusion(self, matrix: list[list[int]], classes: list[str]) -> None:
        self._tell(lambda tracker: tracker.confusion(matrix, classes))

    def mistakes(self, items: Sequence[Mapping[str, Any]]) -> None:
        self._tell(lambda tracker: tracker.mistakes(items))

    def summary(self, values: dict[str, Any]) -> None:
        self._tell(lambda tracker: tracker.summary(dict(values)))

    def weights(self, weights: Path, name: str, teacher: tuple[Path, str] | None = None) -> None:
        for each in self.guarded:
            each.tell(lambda tracker: tracker.weights(weights, name, teacher), UPLOAD_S)

    def close(self) -> None:
        for each in self.guarded:
            each.close()
        self.guarded = []

    def _tell(self, call: Callable[[RunTracker], None]) -> None:
        for each in self.guarded:
            each.tell(call, self.answer_s)


class _Guarded:
    """One tracker on a thread of its own.

    A call that does not return can then be given up. It is one thread for all calls, because some clients keep their run in a variable of
    the thread. The caller waits for each answer: a tracker may change what belongs to the whole process, such as the temporary folder.
    """

    def __init__(self, name: str, make: Make, say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.failed = self.stuck = False
        self.calls: SimpleQueue[tuple[Callable[[RunTracker], None], Future[None]] | None] = SimpleQueue()
        Thread(target=self._answer, args=(make,), daemon=True, name=f"tracker {name}").start()  # a stuck one must not keep the process

    def tell(self, call: Callable[[RunTracker], None], limit_s: float) -> None:
        """Make one call, unless an earlier one has failed."""
        if not self.failed:
            self._call(call, limit_s)

    def close(self) -> None:
        """End the tracker, failed or not, and its thread."""
        if not self.stuck:
            self._call(lambda tracker: tracker.close(), UPLOAD_S)
        self.calls.put(None)

    def _call(self, call: Callable[[RunTracker], None], limit_s: float) -> None:
        answer: Future[None] = Future()
        self.calls.put((call, answer))
        try:
            error = answer.exception(limit_s)
        except TimeoutError:
            self.stuck = True
            self._fail(f"no answer for {limit_s:.0f} s")
            return
        if error is not None:
            self._fail(f"{type(error).__name__}: {str(error)[:200]}")

    def _fail(self, why: str) -> None:
        if not self.failed:
            self.say(f"tracker {self.name}: {why}; this run goes on without it, metrics-*.jsonl has everything")
        self.failed = True

    def _answer(self, make: Make) -> None:
        tracker: RunTracker | None = None
        while (item := self.calls.get()) is not None:
            call, answer = item
            try:
                tracker = make() if tracker is None else tracker
                call(tracker)
            except BaseException as error:  # SystemExit too: on this thread it can only be the tracker's, and it would end it in silence
                answer.set_exception(error)
            else:
                answer.set_result(None)
