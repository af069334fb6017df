"""Progress of long work far from the console, such as reading a million files: the work reports, and whoever waits for it listens."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Listener = Callable[[str], None]
"""Called in the thread of the work with how far it is, such as `1,200 of 100,000`. May raise, as for a stop: the work then ends."""

REPORT_S = 0.5
"""Least time between two reports, seconds."""
LOG_S = 60.0
"""Seconds between two lines where nobody listens."""
PAUSE_S = 5.0
"""A report this many seconds behind the one before it belongs to another work, which has not lasted a minute yet."""

_listeners: list[Listener] = []
_last: dict[str, float] = {"report": 0.0, "line": 0.0}
_text = [""]


@contextlib.contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Inside, the listener gets every report of this process."""
    if not _listeners:
        _last["report"], _text[0] = 0.0, ""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def report(text: str) -> None:
    """Say how far a long work is, as often as you like: listeners hear it every REPORT_S seconds. Else stderr gets a line a minute."""
    now = time.monotonic()
    if now - _last["report"] < REPORT_S:
        return
    if now - _last["report"] > PAUSE_S:
        _last["line"] = now
    _last["report"], _text[0] = now, text
    if _listeners:
        for listener in tuple(_listeners):
            listener(text)
    elif text and now - _last["line"] >= LOG_S:
        sys.stderr.write(f"tltrain: {time.strftime('%H:%M:%S')}  {text}\n")
        sys.stderr.flush()
        _last["line"] = now


def alive() -> None:
    """Report the same again: a work that waits goes on. Listeners may be other processes that wait for a sign of life."""
    report(_text[0])


class Pace:
    """Reports how much of a work is done, and by its pace how long the rest will take."""

    def __init__(self, what: str, total: int) -> None:
        """what: what is counted, such as `images read`."""
        self.what, self.total, self.done, self.began = what, total, 0, time.monotonic()

    def advance(self, num: int = 1) -> None:
        self.done += num
        self.report()

    def report(self) -> None:
        if time.monotonic() - _last["report"] >= REPORT_S:
            report(str(self))

    @property
    def per_s(self) -> float:
        """Mean pace so far. 0 before anything is done."""
        return self.done / max(time.monotonic() - self.began, 1e-9)

    def __str__(self) -> str:
        text = f"{self.done:,} of {self.total:,} {self.what}"
        if self.done == 0:
            return text
        seconds = round((self.total - self.done) / self.per_s)
        left = f"{seconds} s" if seconds < 60 else f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        return f"{text}, {self.per_s:,.0f} a second, {left} left"
