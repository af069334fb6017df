"""Signals that ask a run to save and stop: SIGTERM, SIGINT, SIGUSR2."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType


class StopSignal:
    """Records that a signal asked this process to stop. The handler only sets a flag: saving or communicating in it could deadlock."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: str | None = None
        self.since = 0.0

    @property
    def requested(self) -> int:
        """1 after a signal, else 0: a flag for `FlagAllReduce`."""
        return int(self.signal is not None)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Handle the signals inside the block. A second Ctrl-C raises KeyboardInterrupt at once."""
        previous = {number: signal.signal(number, self._set) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.signal == name and time.monotonic() - self.since > 1.0:
            raise KeyboardInterrupt  # within 1 s it is the same Ctrl-C: the terminal and the launcher both send it
        self.signal, self.since = name, time.monotonic()
