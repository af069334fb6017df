"""One process is watched too: what hangs is broken off, what is paused or the caller's own is not."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import made_recipe

from tltrain.core.errors import MachineError, StoppedAtOnce
from tltrain.core.flags import RunFlags
from tltrain.distributed import watchdog
from tltrain.distributed.runtime import Runtime, torch_settings_kept
from tltrain.distributed.signals import NoAnswer, StopSignal
from tltrain.distributed.watchdog import CALLER, Watch
from tltrain.runs import checkpoint, run_dir
from tltrain.runs.checkpoint import Progress, Saver, State
from tltrain.training.run import train


class Watched:
    """A watch of one process, and what it asked for."""

    def __init__(self, folder: Path, timeout_s: float, ours: bool = True) -> None:
        run_dir.create(folder, made_recipe())
        self.broken_off: list[str] = []
        self.failed: list[dict[str, Any]] = []

        def break_off(why: str) -> bool:
            self.broken_off.append(why)
            return ours

        self.watch = Watch(folder, run_dir.claim(folder), 0, 1, timeout_s, lambda newer: None, self.failed.append, break_off)

    def wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.broken_off and time.monotonic() < until:
            time.sleep(0.02)


def test_a_single_process_that_hangs_is_broken_off_with_its_place(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "run", 0.4)
    watched.watch.at("head", 3, "train")
    watched.wait(20)
    watched.watch.close()
    assert len(watched.broken_off) == 1
    assert "no progress for 0 s in stage head, step 3 (train)" in watched.broken_off[0]
    assert "--timeout-minutes" in watched.broken_off[0]


@pytest.mark.parametrize("how", ["goes on", "a large file grows", "the caller's own code"])
def test_what_is_no_hang_is_left_alone(how: str, tmp_path: Path) -> None:
    watched = Watched(tmp_path / "run", 1.0)
    watched.watch.at("head", 3, CALLER if how == "the caller's own code" else "save")
    for _ in range(20):
        time.sleep(0.1)
        if how != "the caller's own code":
            watched.watch.at("head", 3, "train") if how == "goes on" else watched.watch.alive()
    watched.watch.close()
    assert watched.broken_off == []


def test_a_process_that_was_paused_has_not_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-Z and fg, or a laptop that slept, the clock has run and nothing has hung."""
    monkeypatch.setattr(watchdog, "PAUSED_S", 0.5)
    watched = Watched(tmp_path / "run", 1.2)
    beat, slept = watched.watch._beat, iter([1.5])

    def late() -> None:
        time.sleep(next(slept, 0.0))  # the watching thread stands still as well
        beat()

    monkeypatch.setattr(watched.watch, "_beat", late)
    time.sleep(2.2)
    paused = list(watched.broken_off)
    watched.wait(20)
    watched.watch.close()
    assert paused == []
    assert watched.broken_off, "what hangs after a pause is broken off all the same"


def test_a_process_of_another_program_is_told_and_not_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run in a thread of a notebook: no handler of ours, so no error can be raised there, and the program is not ours to end."""
    watched = Watched(tmp_path / "run", 0.3, ours=False)
    watched.wait(20)
    time.sleep(1.0)
    watched.watch.close()
    assert len(watched.broken_off) == 1
    assert [details["outcome"] for details in watched.failed] == ["failed"]
    assert capsys.readouterr().err.count("no progress") == 1


def test_a_wait_is_broken_off_by_an_error() -> None:
    with StopSignal().listening() as stop:
        threading.Timer(0.2, lambda: stop.break_off("no progress")).start()
        with pytest.raises(NoAnswer, match="no progress"):
            threading.Event().wait(30)
    assert StopSignal().break_off("nobody listens") is False


def test_a_signal_before_the_first_step_ends_a_wait_at_once() -> None:
    with StopSignal().listening() as stop:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(StoppedAtOnce, match="SIGTERM"), stop.ending_at_once():
            threading.Event().wait(30)
        assert stop.signal == "SIGTERM"
        with pytest.raises(StoppedAtOnce), stop.ending_at_once():
            pytest.fail("a signal that came before is heard at the door")


def test_in_a_thread_no_signal_is_handled_and_nothing_fails() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def listen() -> None:
        with StopSignal().listening() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [0]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_disk_that_does_not_answer_ends_the_wait_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: let_go.wait(60))
    saver = Saver(tmp_path, 1, 1, lambda: True, limit_s=1.5)
    saver.submit(State(Progress(), {}))
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"no byte of a checkpoint.*same command goes on"):
        saver.wait()
    let_go.set()
    assert time.monotonic() - began < 30


def test_a_large_checkpoint_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []

    def slowly(*arguments: Any) -> None:
        (tmp_path / ".000001-00-00000000-0.tmp").mkdir()
        for number in range(4):
            time.sleep(1.1)
            (tmp_path / ".000001-00-00000000-0.tmp" / str(number)).write_bytes(b"more")

    monkeypatch.setattr(checkpoint, "save", slowly)
    saver = Saver(tmp_path, 1, 1, lambda: True, limit_s=2.0, alive=lambda: alive.append(1))
    saver.submit(State(Progress(), {}))
    saver.wait()
    assert len(alive) >= 3


def test_a_second_run_in_one_process_is_refused(tmp_path: Path) -> None:
    errors: list[str] = []

    def again(stage: str, step: int) -> None:
        with pytest.raises(Exception, match="another training goes on") as caught:
            train(made_recipe(), RunFlags(folder=tmp_path / "other", workers=0))
        errors.append(str(caught.value))

    train(made_recipe().smoke(), RunFlags(folder=tmp_path / "run", workers=0), on_step=again)
    assert errors
    assert not (tmp_path / "other").exists()


def test_an_interrupt_has_an_outcome_too(tmp_path: Path) -> None:
    def interrupt(stage: str, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(made_recipe(), RunFlags(folder=tmp_path / "run", workers=0), on_step=interrupt)
    outcome = run_dir.outcome(tmp_path / "run")
    assert outcome["outcome"] == "failed"
    assert "KeyboardInterrupt" in outcome["error"]


def test_the_peak_of_an_earlier_run_is_not_this_ones() -> None:
    def take(size: int) -> None:
        """Touch `size` bytes of fresh memory: the heap of a process that ran many tests may hold as much, free and resident."""
        with mmap.mmap(-1, size) as memory:
            for page in range(0, size, mmap.PAGESIZE):
                memory[page] = 1

    with torch_settings_kept():
        Runtime(True)
        take(480_000_000)
        before = Runtime.peak_bytes(runtime := Runtime(True))
        take(240_000_000)
        assert 200e6 < runtime.peak_bytes() - before < 400e6, "what was freed before does not count, what was taken since does"
        runtime.close()
