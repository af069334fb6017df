"""Files that can be read: a named pipe or a device among the images would be waited for without end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder",
}  # fmt: skip


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises OSError, and for anything that is no regular file says what it is."""
    _check(path.stat().st_mode)  # before it is opened: opening a device may do something
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))  # it may be another one by now
    with os.fdopen(handle, "rb") as file:
        _check(os.fstat(handle).st_mode)
        return file.read()


def _check(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(f"{KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")
