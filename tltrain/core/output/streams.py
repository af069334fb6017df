"""Standard output and standard error that survive a closed pipe, a full disk and text that cannot be encoded."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper, UnsupportedOperation
from typing import Any, TextIO

from tltrain.core.output import escape, wrapping


class Lasting:
    """A text stream whose write errors are ignored: text that cannot be written is dropped.

    It writes to the file descriptor directly. A buffered stream would keep text that it could not write, and fail at every later line.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.gone = stream, False
        self.flush()
        self.handle: int | None = None  # the descriptor of a notebook's stream is that of its server, where nobody reads
        with suppress(UnsupportedOperation, OSError, ValueError):
            self.handle = stream.fileno() if isinstance(stream, TextIOWrapper | Lasting) else None

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            if self.handle is None:
                self.stream.write(text)
            elif not self.gone:
                self._write(text.encode(self.stream.encoding or "utf-8", ESCAPED))
        return len(text)

    def _write(self, remaining: bytes) -> None:
        assert self.handle is not None
        try:
            while remaining:
                remaining = remaining[os.write(self.handle, remaining) :]
        except OSError as error:
            self.gone = error.errno == errno.EPIPE  # other errors may pass: a full disk can get room again
            raise

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, printing raises no error: training goes on when the reader of its output is gone."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def open_missing() -> None:
    """Open /dev/null for a standard stream that the process was started without, so that no other file takes its descriptor."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  open until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


ESCAPED = "tltrain-escaped"
"""How a stream encodes what its encoding does not have, as ASCII: our own signs by others, all else escaped. An error handler of codecs."""
READABLE = "tltrain-readable"
"""The same, with the bytes of file names that are no UTF-8 as they are."""
_SIGNS = {
    "\u00a0": b" ", "\u202f": b" ",  # between words, or a number and its unit, that stay in one line
    "\u2013": b"-", "\u2212": b"-", "\u2026": b"~", "\u2500": b"-", "\u2501": b"-",
    # the frames of rich's spinner
    **dict(zip("\u280b\u2819\u2839\u2838\u283c\u2834\u2826\u2827\u2807\u280f", [b"|", b"/", b"-", b"\\"] * 3, strict=False)),
}  # fmt: skip
"""Of what we print ourselves. Each is as wide as what stands for it."""


def _escaped(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    return _SIGNS.get(sign) or sign.encode("ascii", "backslashreplace"), error.start + 1


def _readable(error: UnicodeError) -> tuple[bytes, int]:
    if isinstance(error, UnicodeEncodeError) and "\udc80" <= (sign := error.object[error.start]) <= "\udcff":
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    return _escaped(error)


codecs.register_error(ESCAPED, _escaped)
codecs.register_error(READABLE, _readable)


def say_all() -> None:
    """Let standard output take any text, whatever its encoding."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors=READABLE)


def write_names() -> None:
    """Let standard output be in the encoding of file names, which is UTF-8 nearly everywhere: a program that reads them finds the files."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding=sys.getfilesystemencoding(), errors=READABLE)


def complain(text: str, code: int) -> int:
    """Print why a command ends to standard error. Returns the exit code."""
    with suppress(OSError):
        wrapping.say(f"tltrain: {escape.terminal(text)}", sys.stderr)
    return code


def lost(error: OSError, code: int) -> int:
    """End a command after an OSError that may come from writing to standard output.

    Returns `code` for a closed pipe, and prints the reason otherwise. Re-raises an error that has another origin.
    """
    try:
        sys.stdout.write("\n")  # a second write shows whether standard output is the cause
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        closed = isinstance(error, BrokenPipeError)  # such as `| head`, which has read enough
        return code if closed else complain(f"standard output cannot be written: {error.strerror}", code)
    raise error
