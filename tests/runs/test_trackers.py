"""Trackers may raise, leave the process or never answer: it is said once, and the run goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import command
from tltrain.core.arguments.parsing import parse
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.runs import trackers
from tltrain.runs.trackers import RunTracker, TrackedRun, Trackers, chosen
from tltrain.runs.trackers.values import confusion_title, confusions

CALLS: list[Callable[[RunTracker], None]] = [
    lambda t: t.open(TrackedRun(Path(), "n", {"name": "r"}, (3,), RunFlags(), print)),
    lambda t: t.log({"kind": "train", "loss": 1.0}),
    lambda t: t.plan("head"),
    lambda t: t.preview(Path("preview.png")),
    lambda t: t.confusion([[1]], ["a"]),
    lambda t: t.mistakes([]),
    lambda t: t.summary({"test/top1": 1.0}),
    lambda t: t.report(Path("report.html")),
    lambda t: t.weights(Path("w.safetensors"), "r"),
    lambda t: t.close(),
]
METHODS = ["open", "log", "plan", "preview", "confusion", "mistakes", "summary", "report", "weights", "close"]


class Recorder(RunTracker):
    """Writes down what it is told, and on which thread."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.threads: set[int] = set()

    def __getattribute__(self, name: str) -> Any:
        if name in METHODS:
            self.told.append(name)
            self.threads.add(threading.get_ident())
        return super().__getattribute__(name)


def test_each_call_arrives_in_order_on_one_thread_of_its_own() -> None:
    one, two, said = Recorder(), Recorder(), list[str]()
    told = Trackers({"one": lambda: one, "two": lambda: two}, said.append)
    for call in CALLS:
        call(told)
    assert one.told == two.told == METHODS
    assert len(one.threads) == len(two.threads) == 1
    assert len({*one.threads, *two.threads, threading.get_ident()}) == 3
    assert said == []


def test_a_tracker_has_a_row_of_its_own() -> None:
    class Greedy(RunTracker):
        def log(self, row: dict[str, Any]) -> None:
            row.clear()

    row = {"kind": "train"}
    Trackers({"greedy": Greedy}, print).log(row)
    assert row == {"kind": "train"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [ConnectionError("gone"), SystemExit(3), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_what_raises_is_said_once_and_told_only_of_the_end(method: str, error: BaseException) -> None:
    healthy, said, told = Recorder(), list[str](), list[str]()

    class ConsistencyError(Recorder):
        def __getattribute__(self, name: str) -> Any:
            if name not in METHODS:
                return super().__getattribute__(name)
            told.append(name)
            if name in (method, "close"):  # the second error is not said
                raise error
            return super().__getattribute__(name)

    both = Trackers({"broken": ConsistencyError, "healthy": lambda: healthy}, said.append)
    for call in CALLS:
        call(both)
    assert told == [*METHODS[: METHODS.index(method) + 1], *([] if method == "close" else ["close"])]
    assert healthy.told == METHODS
    assert len(said) == 1
    assert said[0].startswith(f"tracker broken: {type(error).__name__}: ")


def test_a_tracker_that_cannot_be_made_is_said_once() -> None:
    def make() -> RunTracker:
        raise RuntimeError("no server")

    said: list[str] = []
    told = Trackers({"x": make}, said.append)
    for call in CALLS:
        call(told)
    assert len(said) == 1
    assert "RuntimeError: no server" in said[0]


@pytest.mark.parametrize("method", METHODS)
def test_what_never_answers_is_given_up(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call still waits when the run has ended: nobody has waited for it."""
    monkeypatch.setattr(trackers, "UPLOAD_S", 0.05)
    over, healthy, said, told = threading.Event(), Recorder(), list[str](), list[str]()

    class Stuck(Recorder):
        def __getattribute__(self, name: str) -> Any:
            if name in METHODS:
                told.append(name)
                if name == method:
                    over.wait()
            return super().__getattribute__(name)

    both = Trackers({"stuck": Stuck, "healthy": lambda: healthy}, said.append, answer_s=0.05)
    for call in CALLS:
        call(both)
    assert not over.is_set()
    assert said == ["tracker stuck: no answer for 0 s; this run goes on without it, metrics-*.jsonl has everything"]
    assert told == METHODS[: METHODS.index(method) + 1]
    assert healthy.told == METHODS
    over.set()
    for thread in threading.enumerate():
        if thread.name == "tracker stuck":
            thread.join()
    assert told == METHODS[: METHODS.index(method) + 1], "its end is not waited for either"


def test_the_flags_choose() -> None:
    assert list(chosen(RunFlags())) == []
    assert list(chosen(RunFlags(wandb="offline"))) == ["wandb"]
    assert list(chosen(RunFlags(trackers=("wandb",), wandb="offline"))) == ["wandb"]
    with pytest.raises(UserError, match=r"--trackers has 'wandbb'; did you mean wandb\?"):
        RunFlags(trackers=("wandbb",))
    with pytest.raises(UserError, match="did you mean wandb"):
        parse("train", ["digits-resnet", "--trackers", "wandbb"])


def test_several_are_named_with_spaces_or_commas() -> None:
    for words in (["tensorboard,wandb", "mlflow"], ["tensorboard", "wandb,mlflow"], ["tensorboard,", "wandb", "mlflow"]):
        assert parse("train", ["digits-resnet", "--trackers", *words])[1].trackers == ("tensorboard", "wandb", "mlflow")
    with pytest.raises(UserError, match=r"--trackers has 'tensorbord'; did you mean tensorboard\?"):
        RunFlags(trackers=("wandb,tensorbord",))


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_a_missing_package_is_named_with_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"--trackers {name} needs {name}; install with: pip install 'tltrain\[{name}\]'"):
        chosen(RunFlags(trackers=(name,)))


def test_the_worst_confusions_come_first_and_the_right_answers_last() -> None:
    matrix = [[5, 1, 0], [3, 4, 0], [0, 2, 6]]
    cells = [("b", "a", 3), ("c", "b", 2), ("a", "b", 1), ("c", "c", 6), ("a", "a", 5), ("b", "b", 4)]
    assert confusions(matrix, ["a", "b", "c"]) == cells
    assert confusions(matrix, ["a", "b", "c"], limit=2) == cells[:2]
    assert confusion_title(matrix, 6) == "Test confusion"
    assert confusion_title(matrix, 2) == "Test confusion, 2 of 6 cells above zero, the worst first"


def test_a_job_is_given_the_same_trackers() -> None:
    given = command.flags(RunFlags(trackers=("wandb", "wandb"), keep=1))
    assert given == ["--keep", "1", "--trackers", "wandb", "wandb"]
    assert parse("train", ["digits-resnet", *given])[1] == RunFlags(trackers=("wandb", "wandb"), keep=1)


def test_a_stop_shortens_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is preempted has little time: what has not answered by then is given up."""
    monkeypatch.setattr(trackers, "HURRIED_S", 0.2)
    monkeypatch.setattr(trackers, "POLL_S", 0.1)
    over, said = threading.Event(), list[str]()

    class Stuck(Recorder):
        def log(self, row: dict[str, Any]) -> None:
            over.wait()

    hurried = Trackers({"stuck": Stuck}, said.append, answer_s=60.0, hurried=lambda: True)
    began = time.monotonic()
    hurried.log({"kind": "train"})
    hurried.close()
    assert time.monotonic() - began < 30
    assert "no answer" in said[0]
    over.set()
