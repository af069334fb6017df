"""Hinders real runs: signals, dead and silent processes, full disks, pipes. Each ends with a word, and goes on to the same end."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.plants import after_steps, own_rank, wrap


def signal_at(moment: str, name: str, rank: int = 0) -> None:
    """A signal to one rank in the middle of a step, an evaluation, a save, or between two stages."""
    from tltrain.runs import checkpoint
    from tltrain.training import loop, run

    places: dict[str, tuple[Any, str, int]] = {
        "step": (loop, "apply_mixup", 1),
        "evaluate": (loop, "answers", 2),
        "save": (checkpoint, "_write", 1),
        "between": (run, "save_stage_weights", 1),
    }
    owner, function, number = places[moment]
    calls = iter(range(1, 10**9))

    def around(original: Any, *arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.3 if moment == "save" else 0.0)  # a save runs beside the loop, which shall meet the signal while it lasts
        return original(*arguments, **named)

    if own_rank() == rank:
        wrap(owner, function, around)


def signal_in_evaluation(number: int, rank: int, folder: str) -> None:
    """Evaluation is slow, and in its batch number `number` (over all evaluations) one rank gets SIGTERM. Every rank writes a byte into a
    file of its own for each batch that it evaluates."""
    from tltrain.evaluation import evaluator

    file = open(f"{folder}/batches.rank{own_rank()}", "wb", buffering=0)  # noqa: SIM115 (it stays open as long as the process)
    calls = iter(range(1, 10**9))

    def around(original: Any, *arguments: Any) -> Any:
        file.write(b".")
        if next(calls) == number and own_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        return original(*arguments)

    wrap(evaluator, "_row", around)


def slow_evaluation(numbers: list[int], seconds: float) -> None:
    """Some batches of the evaluations, by their number over all of them, take seconds longer."""
    from tltrain.evaluation import evaluator

    calls = iter(range(1, 10**9))

    def around(original: Any, *arguments: Any) -> Any:
        time.sleep(seconds if next(calls) in numbers else 0.0)
        return original(*arguments)

    wrap(evaluator, "_row", around)
    wrap(evaluator, "_logits_row", around)


def signal_in(module: str, function: str, number: int, name: str = "SIGTERM") -> None:
    """A signal at the call number `number` of a function of tltrain."""
    calls = iter(range(1, 10**9))

    def around(original: Any, *arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), getattr(signal, name))
        return original(*arguments, **named)

    wrap(importlib.import_module(f"tltrain.{module}"), function, around)


def hang_in(module: str, function: str, number: int, how: str) -> None:
    """The call number `number` of a function of tltrain never comes back.

    how: waits, as Python does for a lock, which a signal ends; or stuck, as a dead network mount is, which no signal ends.
    """
    calls = iter(range(1, 10**9))

    def around(original: Any, *arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            threading.Event().wait() if how == "waits" else _stick()
        return original(*arguments, **named)

    wrap(importlib.import_module(f"tltrain.{module}"), function, around)
    importlib.import_module("tltrain.distributed.watchdog").GRACE_S = 1.0  # type: ignore[attr-defined]


def _stick() -> None:
    """Take a lock of the C library twice: the second time waits for ever, and no signal ends that."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def fail_in(module: str, function: str) -> None:
    """A function of tltrain raises an error that nobody expects."""

    def around(original: Any, *arguments: Any, **named: Any) -> Any:
        raise RuntimeError("planted")

    wrap(importlib.import_module(f"tltrain.{module}"), function, around)


def rename_after(num_steps: int, run: str) -> None:
    """The run folder gets another name after a number of steps."""
    after_steps(num_steps, lambda: os.rename(run, f"{run}-elsewhere"))


def hold_old_checkpoints(run: str) -> None:
    """From the second save on, no checkpoint that stands can be deleted or renamed: something is mounted on it, as root may."""
    from tltrain.runs import checkpoint

    def around(original: Any, *arguments: Any) -> Any:
        for old in checkpoint.committed(arguments[0]):
            if not os.path.ismount(old):
                subprocess.run(["mount", "--bind", old, old], check=True)
        return original(*arguments)

    wrap(checkpoint, "save", around)


def kill_in(module: str, function: str, number: int) -> None:
    """SIGKILL at the call number `number` of a function of tltrain."""
    signal_in(module, function, number, "SIGKILL")


def end_process(num_steps: int, rank: int, name: str) -> None:
    """SIGKILL or SIGSTOP to one rank in the middle of its step number `num_steps`."""
    if own_rank() == rank:
        signal_in("training.loop", "apply_mixup", num_steps, name)


def kill_worker(num_steps: int, rank: int) -> None:
    """SIGKILL to a data worker of one rank after a number of steps."""
    from torch.utils.data import dataloader

    workers: list[Any] = []

    def around(original: Any, self: Any, loader: Any) -> None:
        original(self, loader)
        workers.extend(self._workers)

    wrap(dataloader._MultiProcessingDataLoaderIter, "__init__", around)
    if own_rank() == rank:
        after_steps(num_steps, lambda: os.kill(next(w for w in workers if w.is_alive()).pid, signal.SIGKILL))


def nan_on(num_steps: int, rank: int) -> None:
    """The loss of one rank becomes NaN in its step number `num_steps` (one micro-batch a step)."""
    from tltrain.training.losses import objective

    calls = iter(range(1, 10**9))

    def around(original: Any, *arguments: Any) -> Any:
        loss_B = original(*arguments)
        return loss_B * float("nan") if next(calls) == num_steps else loss_B

    if own_rank() == rank:
        wrap(objective.Objective, "__call__", around)


def cramped(forward: Any, what: str, num_images: int) -> Any:
    """Chain.forward of a device that has room for `num_images` at a time, in training (train), evaluation, or what is frozen."""

    def tried(self: Any, x: Any, start: int = 0, stop: int | None = None) -> Any:
        here = "train" if torch.is_grad_enabled() else "evaluation" if stop is None else "frozen"
        if here == what and len(x) > num_images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (planted)")
        return forward(self, x, start, stop)

    return tried


def little_room(what: str, num_images: int, rank: int = 0, stuck: bool = False) -> None:
    """`cramped`, on one rank. stuck: when it is out of memory, the others wait for it without an end, as in a call of NCCL."""
    from tltrain.distributed.strategies import Strategy
    from tltrain.models.chain import Chain

    if own_rank() == rank:
        Chain.forward = cramped(Chain.forward, what, num_images)  # type: ignore[method-assign]
    elif stuck:
        wrap(Strategy, "backward", lambda original, *arguments: time.sleep(10**6))


def little_room_then_signal(what: str, num_images: int, num_steps: int) -> None:
    little_room(what, num_images)
    after_steps(num_steps, lambda: os.kill(os.getpid(), signal.SIGTERM))


def no_room_at(number: int, rank: int = 0) -> None:
    """One rank is out of memory once, at its micro-batch number `number` over all stages."""
    from tltrain.training import loop

    calls = iter(range(1, 10**9))

    def around(original: Any, *arguments: Any) -> Any:
        if next(calls) == number:
            raise torch.OutOfMemoryError("CUDA out of memory. (planted)")
        return original(*arguments)

    if own_rank() == rank:
        wrap(loop, "apply_mixup", around)


def fill_disk(num_steps: int, folder: str, num_left: int) -> None:
    """After a number of steps, fill the file system of `folder` with one file, but for `num_left` bytes."""
    if own_rank() == 0:
        after_steps(num_steps, lambda: _fill(folder, num_left))


def _fill(folder: str, num_left: int) -> None:
    disk = os.statvfs(folder)
    with open(f"{folder}/ballast", "wb") as file:
        file.write(bytes(max(0, disk.f_bavail * disk.f_frsize - num_left)))


def spoil_before(module: str, function: str, disk: str, how: str) -> None:
    """Just before a function of tltrain, a file system becomes full or read-only."""

    def around(original: Any, *arguments: Any, **named: Any) -> Any:
        if how == "full":
            _fill(disk, 0)
        else:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        return original(*arguments, **named)

    if own_rank() == 0:
        wrap(importlib.import_module(f"tltrain.{module}"), function, around)


def full_metrics(number: int) -> None:
    """From a start's row number `number` on, its metrics go to a device that is always full."""
    from tltrain.runs.metrics_log import MetricsLog

    rows = iter(range(1, 10**9))

    def around(original: Any, self: MetricsLog, row: dict[str, Any]) -> None:
        if next(rows) == number:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, self.file.fileno())
            os.close(full)
        original(self, row)

    wrap(MetricsLog, "log", around)


def make_read_only(number: int, folder: str) -> None:
    """Just before save number `number`, `folder` is a read-only file system."""
    from tltrain.runs import checkpoint

    saves = iter(range(1, 10**9))

    def around(original: Any, *arguments: Any) -> Any:
        if next(saves) == number:  # permissions do not stop root
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], check=True)
        return original(*arguments)

    if own_rank() == 0:
        wrap(checkpoint, "save", around)


def main(words: Sequence[str] | None = None) -> None:
    from benchmarks.cases import run_all

    run_all(words, str(__doc__))


if __name__ == "__main__":
    main()
