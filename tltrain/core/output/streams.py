"""Standard output and standard error: readers may go away, disks may be full, and names may hold anything."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import UnsupportedOperation
from typing import Any, TextIO

from tltrain.core.output import escape


class Lasting:
    """A text stream that may lose its reader, or the room for what is written: what it cannot take is lost, and nothing is raised.

    Written past the buffers of the stream, which would keep what cannot be written and fail with it again at every later line.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.gone = stream, False
        self.flush()
        try:
            self.handle: int | None = stream.fileno()
        except (AttributeError, UnsupportedOperation, OSError, ValueError):
            self.handle = None  # of a notebook, or a test

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            if self.handle is None:
                self.stream.write(text)
            elif not self.gone:
                self._write(text.encode(self.stream.encoding or "utf-8", "backslashreplace"))
        return len(text)

    def _write(self, left: bytes) -> None:
        assert self.handle is not None
        try:
            while left:
                left = left[os.write(self.handle, left) :]
        except OSError as error:
            self.gone = error.errno == errno.EPIPE  # a disk may have room again
            raise

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, nothing that is printed can fail: training does not depend on who reads what it says."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def open_missing() -> None:
    """Where a process was started without standard output or error, what is printed there is lost, and no other file takes its number."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def complain(text: str, code: int) -> int:
    """Say why a command ends, to whom can hear it. Returns the exit code."""
    with suppress(OSError):
        print(f"tltrain: {escape.terminal(text)}", file=sys.stderr, flush=True)
    return code


def lost(error: OSError, code: int) -> int:
    """The end of a command whose words standard output does not take. Returns the exit code. Raises an error of anything else."""
    try:
        sys.stdout.write("\n")  # what was refused may be forgotten by now
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        enough = isinstance(error, BrokenPipeError)  # `| head` has read enough
        return code if enough else complain(f"standard output cannot be written: {error.strerror}", code)
    raise error
