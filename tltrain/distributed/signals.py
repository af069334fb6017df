"""Signals that ask a run to save and stop: SIGTERM, SIGINT, SIGUSR2."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from tltrain.core.errors import StoppedAtOnce

SAME_S = 1.0
"""Two SIGINTs within this time are one Ctrl-C: the terminal and the launcher both send it."""
LAST_RESORT_S = 5.0
"""Longest time that a process has to end after a second Ctrl-C, seconds."""


class NoAnswer(BaseException):
    """This process has waited too long: raised in the main thread for the watchdog. As KeyboardInterrupt, it is no Exception."""


class StopSignal:
    """Records that a signal asked this process to stop. The handler only sets a flag: saving or communicating in it could deadlock."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: str | None = None
        self.since = 0.0
        self._at_once = False
        self._hang: str | None = None

    @property
    def requested(self) -> int:
        """1 after a signal, else 0: a flag for `FlagAllReduce`."""
        return int(self.signal is not None)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Handle the signals inside the block. A second Ctrl-C raises KeyboardInterrupt at once.

        In another thread than the main one nothing is handled: Python gives signals to the main thread alone.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.signal(number, self._set) for number in self.SIGNALS}
        try:
            with last_resort():
                yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Inside, a signal raises StoppedAtOnce, whatever the process waits for. For a process on its own, before its first step."""
        if self.signal is not None:
            raise StoppedAtOnce(self.signal)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def break_off(self, why: str) -> bool:
        """Raise NoAnswer in the main thread, if it is in Python code or in a system call that a signal ends. For other threads.

        Returns False where this does not handle the signals of the process, which then belongs to another program.
        """
        if signal.getsignal(signal.SIGTERM) != self._set:
            return False
        self._hang = why
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        return True

    def _set(self, number: int, frame: FrameType | None) -> None:
        if (why := self._hang) is not None:
            self._hang = None
            raise NoAnswer(why)
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.signal == name and time.monotonic() - self.since > SAME_S:
            raise KeyboardInterrupt
        self.signal, self.since = name, time.monotonic()
        if self._at_once:
            self._at_once = False
            raise StoppedAtOnce(name)


@contextlib.contextmanager
def last_resort() -> Iterator[None]:
    """Inside, a second Ctrl-C ends the process after LAST_RESORT_S, also where no exception reaches the main thread.

    Python's handlers run in the main thread, which a dead network mount holds in a system call. The numbers of signals are written to a
    pipe in spite of that, and another thread reads them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(reading, True)
    before, over = signal.set_wakeup_fd(writing, warn_on_full_buffer=False), threading.Event()
    reader = threading.Thread(target=_count_interrupts, args=(reading, over), daemon=True, name="tltrain-signals")
    reader.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(writing)  # the reader sees the end
        reader.join(timeout=1)


def _count_interrupts(reading: int, over: threading.Event) -> None:
    first: float | None = None
    with open(reading, "rb", buffering=0) as pipe:
        while numbers := pipe.read(64):
            if signal.SIGINT not in numbers:
                continue
            if first is None or time.monotonic() - first <= SAME_S:
                first = first or time.monotonic()
            elif not over.wait(LAST_RESORT_S):
                sys.stderr.write("tltrain: interrupted; something does not answer, so this process ends without waiting for it\n")
                sys.stderr.flush()
                os._exit(130)
