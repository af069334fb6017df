"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType


class StopSignal:
    """Whether somebody asked this process to stop. The handler only sets a flag: saving or communicating in it could deadlock."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: str | None = None
        self.since = 0.0

    @property
    def asked(self) -> int:
        """1 where somebody did, as a fact to agree on."""
        return int(self.signal is not None)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Handle the signals inside the block; a second Ctrl-C ends at once."""
        previous = {number: signal.signal(number, self._set) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.signal == name and time.monotonic() - self.since > 1.0:
            raise KeyboardInterrupt  # within a second it is the same Ctrl-C: the terminal sends it, and a launcher forwards its own
        self.signal, self.since = name, time.monotonic()
