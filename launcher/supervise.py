"""Runs `accelerate launch` and forwards signals to the training processes.

SIGUSR2 would end `accelerate launch` and orphan the training. With one process, SIGTERM would too. So it is started with these signals
ignored, and its children get them directly. `launcher.worker` restores the default handlers.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

FORWARDED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLL_S = 0.1


@dataclass(frozen=True)
class End:
    """How a command ended."""

    code: int
    signals: tuple[str, ...]
    """Names of the signals received while it ran, in order."""


def supervise(command: Sequence[str], environment: Mapping[str, str], output: Callable[[bytes], None] | None = None) -> End:
    """Run a command in a session of its own until it ends, then kill what is left of the session.

    Signals are forwarded to its children. A second SIGINT kills everything at once.
    output: called with each block that the command prints. None leaves the output on the terminal.
    """
    with _collecting() as received:
        pipe = subprocess.PIPE if output is not None else None
        child = subprocess.Popen(
            list(command), env={**os.environ, **environment}, stdout=pipe, stderr=subprocess.STDOUT if pipe else None,
            stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_ignore_signals,
        )  # fmt: skip
        reader = threading.Thread(target=_pump, args=(child, output), daemon=True) if output is not None else None
        if reader is not None:
            reader.start()
        try:
            _watch(child, received)
        finally:
            _kill(child)  # data workers and other processes left in its session
        if reader is not None:
            reader.join(timeout=5)
    return End(child.returncode, tuple(signal.Signals(number).name for number in received))


def _watch(child: subprocess.Popen[bytes], received: list[int]) -> None:
    delivered: set[tuple[int, int]] = set()  # (process, signal)
    while child.poll() is None:
        if received.count(signal.SIGINT) > 1:
            _kill(child)
        for number in dict.fromkeys(received):
            for process in _children(child.pid):
                _forward(process, number, delivered)
        time.sleep(POLL_S)


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _forward(process: int, number: int, delivered: set[tuple[int, int]]) -> None:
    """Forward a signal to a process once. A process that ignores it is still starting, so it is skipped until a later poll."""
    sent = signal.SIGTERM if number == signal.SIGHUP else number
    if (process, number) in delivered or _ignores(process, sent):
        return
    delivered.add((process, number))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, sent)


def _ignores(process: int, number: int) -> bool:
    """Whether a process ignores a signal now, from /proc. Outside Linux this is always False: a starting process may miss a signal."""
    with contextlib.suppress(OSError):
        masks = re.findall(r"^SigIgn:\s*([0-9a-f]+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
        return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)
    return False


def _children(process: int) -> list[int]:
    """Direct children of a process."""
    with contextlib.suppress(psutil.Error):  # it has ended
        return [child.pid for child in psutil.Process(process).children()]
    return []


def _pump(child: subprocess.Popen[bytes], output: Callable[[bytes], None]) -> None:
    assert child.stdout is not None
    while block := os.read(child.stdout.fileno(), 65536):
        output(block)


def _ignore_signals() -> None:
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _collecting() -> Iterator[list[int]]:
    """Collect the signals received inside the block, in order, into the list that it yields."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
