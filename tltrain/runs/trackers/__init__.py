"""Calls the trackers of a run and contains their errors. No other module calls a tracker.

The run folder holds all rows. A tracker shows them elsewhere. It cannot stop a run or delay it for long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.runs.trackers.base import RunTracker, TrackedRun

__all__ = ["RunTracker", "TrackedRun", "Trackers", "chosen"]

ANSWER_S = 60.0
"""Longest wait for a tracker's call during a run, seconds. Opening one may import a large client from a slow disk."""
UPLOAD_S = 300.0
"""Longest wait for a tracker's server at the end of a run, seconds."""

HURRIED_S = 15.0
"""The same once the run is asked to stop: a job that is preempted has little time."""
POLL_S = 1.0

Make = Callable[[], RunTracker]


def chosen(flags: RunFlags) -> dict[str, Make]:
    """The trackers that the flags name: name to class, imported. Raises UserError for one that is unknown or lacks a package."""
    names = dict.fromkeys([*([] if flags.wandb == "disabled" else ["wandb"]), *flags.trackers])
    classes = {name: registry.find("trackers", name, f"--trackers has {name!r}") for name in names}
    for name, make in classes.items():
        missing = [package for package in getattr(make, "packages", ()) if find_spec(package) is None]
        if missing:
            extra = f"'tltrain[{name}]'" if name in registry.KINDS["trackers"] else " ".join(missing)
            raise UserError(f"--trackers {name} needs {', '.join(missing)}; install with: pip install {extra}")
    return classes


class Trackers(RunTracker):
    """All trackers of one start of a run behind one tracker that never raises."""

    def __init__(
        self, classes: Mapping[str, Make], say: Callable[[str], None], answer_s: float = ANSWER_S, hurried: Callable[[], bool] = bool
    ) -> None:
        """say: prints a line. answer_s: longest wait for each call during the run, seconds. hurried: whether the run is asked to stop."""
        self.answer_s = answer_s
        self.guarded = [_Guarded(name, make, say, hurried) for name, make in classes.items()]

    def __len__(self) -> int:
        return len(self.guarded)

    def open(self, run: TrackedRun) -> None:
        self._tell(lambda tracker: tracker.open(run))

    def log(self, row: dict[str, Any]) -> None:
        self._tell(lambda tracker: tracker.log(dict(row)))  # a copy for each tracker: the run still uses this row

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

    def report(self, page: Path) -> None:
        self._tell(lambda tracker: tracker.report(page))

    def close(self) -> None:
        for each in self.guarded:
            each.close()
        self.guarded = []

    def _tell(self, call: Callable[[RunTracker], None]) -> None:
        for each in self.guarded:
            each.tell(call, self.answer_s)


class _Guarded:
    """One tracker on its own thread, so that a call that never returns can be abandoned.

    All calls use the same thread, because some clients store their run in a thread-local variable. The caller waits for each call, because
    a tracker may change process-wide state such as the temporary folder.
    """

    def __init__(self, name: str, make: Make, say: Callable[[str], None], hurried: Callable[[], bool]) -> None:
        self.name, self.say, self.hurried = name, say, hurried
        self.failed = self.stuck = False
        self.calls: SimpleQueue[tuple[Callable[[RunTracker], None], Future[None]] | None] = SimpleQueue()
        Thread(target=self._answer, args=(make,), daemon=True, name=f"tracker {name}").start()  # a stuck one must not block the exit

    def tell(self, call: Callable[[RunTracker], None], limit_s: float) -> None:
        """Make one call, unless an earlier one has failed. A stop shortens the wait to HURRIED_S."""
        if not self.failed:
            self._call(call, limit_s)

    def close(self) -> None:
        """Close the tracker, also after a failure, and end its thread."""
        if not self.stuck:
            self._call(lambda tracker: tracker.close(), UPLOAD_S)
        self.calls.put(None)

    def _call(self, call: Callable[[RunTracker], None], limit_s: float) -> None:
        answer: Future[None] = Future()
        self.calls.put((call, answer))
        waited_s = 0.0
        while True:
            try:
                error = answer.exception(min(POLL_S, limit_s))
                break
            except TimeoutError:
                waited_s += POLL_S
                if waited_s >= (min(HURRIED_S, limit_s) if self.hurried() else limit_s):
                    self.stuck = True
                    self._fail(f"no answer for {min(waited_s, limit_s):.0f} s")
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
            except BaseException as error:  # also SystemExit: it would end this thread without a message
                answer.set_exception(error)
            else:
                answer.set_result(None)
