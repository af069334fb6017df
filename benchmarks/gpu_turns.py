"""Loops in turns: each contestant is one long training in a thread of its own, which stands still while another has its lap.

So every network is built once and compiled once, however many laps it runs; and A B B A holds although no framework lets itself be
interrupted: a loop waits where it asks for its next batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Pair = tuple[Tensor, Tensor]
HERE = threading.local()
"""`feed`: of the contestant whose thread this is."""


class Ended(BaseException):
    """There are no more laps. Not an Exception: nobody who handles the errors of a training shall handle this."""


class Failed(RuntimeError):
    """A contestant's own error, met in its thread."""


class Feed(Dataset[Pair]):
    """Random batches, on the same clock for all: a lap is over when the batch after its last is asked for and the device is done."""

    def __init__(self, batches: Sequence[Pair]) -> None:
        """batches: (images (B, 3, H, W) uint8, labels (B,)), pinned where there is a GPU."""
        self.batches = batches
        self.left, self.watched, self.ending = 0, False, False
        self.step_s: list[float] = []
        self.lap_s, self.began = 0.0, 0.0
        self.losses: list[Tensor] = []
        """Of each step, on the device: whoever trains appends them."""
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)

    def __len__(self) -> int:
        return 10**6

    def __iter__(self) -> Iterator[Pair]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Pair:
        if self.left == 0:
            self.pause()
        self.left -= 1
        if self.watched:  # the warm-up: each step by itself
            synchronise()
            self.step_s.append(time.perf_counter() - self.began)
        return self.batches[step % len(self.batches)]

    def pause(self) -> None:
        """The end of a lap, in the contestant's thread; returns where the next one begins."""
        synchronise()
        self.lap_s = time.perf_counter() - self.began
        own = switches()
        self._done.release()
        self._wait()
        set_switches(own)
        self.began = time.perf_counter()

    def _wait(self) -> None:
        self._go.acquire()
        if self.ending:
            raise Ended

    def lap(self, num_steps: int, watched: bool = False) -> float:
        """Let the contestant go for this many batches: seconds. From the main thread. watched: with the time of each step."""
        self.left, self.watched, self.step_s = num_steps, watched, []
        self._go.release()
        self._done.acquire()
        return self.lap_s

    def close(self, thread: threading.Thread) -> None:
        self.ending = True
        self._go.release()
        thread.join()


class Racer:
    """A contestant: `train` asks its feed for batches until that raises Ended."""

    def __init__(self, name: str, train: Callable[[Feed], Any], batches: Sequence[Pair]) -> None:
        self.name, self.train, self.feed = name, train, Feed(batches)
        self.error: BaseException | None = None
        self.laps: list[float] = []
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def warm_up(self, num_steps: int) -> float:
        """Build, compile, and choose kernels: seconds beyond what these steps take once that is over. Raises Failed."""
        before = switches()
        self.thread.start()
        spent = self.lap(num_steps, watched=True)
        set_switches(before)
        marks = self.feed.step_s
        self.laps.clear()
        return max(0.0, spent - num_steps * (marks[-1] - marks[-2]))

    def lap(self, num_steps: int, watched: bool = False) -> float:
        """Raises Failed."""
        before = switches()
        seconds = self.feed.lap(num_steps, watched)
        set_switches(before)
        if self.error is not None:
            raise Failed(f"{type(self.error).__name__}: {self.error}") from self.error
        self.laps.append(seconds)
        return seconds

    def close(self) -> None:
        if self.thread.is_alive():
            self.feed.close(self.thread)

    def _run(self) -> None:
        HERE.feed = self.feed
        try:
            self.feed._wait()
            self.feed.began = time.perf_counter()
            self.train(self.feed)
            raise RuntimeError("it stopped asking for batches")
        except Ended:
            pass  # `close` ends an endless training this way; it is no failure
        except BaseException as error:
            self.error = error
            self.feed._done.release()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def switches() -> tuple[Any, ...]:
    """torch's process-wide choices of kernels, which frameworks make for their own runs."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return torch.are_deterministic_algorithms_enabled(), filled, cudnn.benchmark, cudnn.deterministic, cuda.allow_tf32


def set_switches(values: tuple[Any, ...]) -> None:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    torch.use_deterministic_algorithms(values[0])
    torch.utils.deterministic.fill_uninitialized_memory = values[1]  # type: ignore[attr-defined]
    cudnn.benchmark, cudnn.deterministic = values[2:4]
    if cuda.allow_tf32 != values[4]:
        cuda.allow_tf32 = values[4]
