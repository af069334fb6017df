"""Files that are whole or absent: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, synced: bool = True) -> Iterator[Path]:
    """A temporary path to write a file at, which takes the place of `path` where the block ends well.

    A reader, or a crash at any moment, sees the old content or the new one and nothing between. synced: the new content is on the disk
    when this returns; without it only a crash of the machine may lose it.
    """
    temporary = temporary_for(path)
    try:
        yield temporary
        if synced:
            sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if synced:
        sync(path.parent)


def temporary_for(path: Path) -> Path:
    """A hidden name beside `path`. Not by process number: machines that share a folder have processes of one number."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file by `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def replace_text(path: Path, text: str) -> None:
    """As write_atomic, without waiting for the disk: for signs of life, which only matter while the machine is up."""
    with replacing(path, synced=False) as temporary:
        temporary.write_text(text)


def write_json_once(path: Path, value: Any) -> bool:
    """Create a file that nobody has created yet; False, and nothing done, where it exists: the first word counts."""
    temporary = temporary_for(path)
    write_json(temporary, value)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=True) + "\n"
    write_atomic(path, text.encode("utf-8", "backslashreplace"))  # a name that is no UTF-8: \udcff, which is JSON's own escape


def commit_folder(temporary: Path, final: Path) -> None:
    """Make a finished folder visible under its name in one step; every file in it is on disk before."""
    for path in temporary.rglob("*"):
        if path.is_file():
            sync(path)
    sync(temporary)
    temporary.rename(final)
    sync(final.parent)


def follow_umask(path: Path) -> None:
    """Give a file the permissions that new files get here: safetensors makes its own readable for their owner alone."""
    probe = temporary_for(path)
    probe.touch(exist_ok=False)
    path.chmod(stat.S_IMODE(probe.stat().st_mode))
    probe.unlink()


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a crash half-way leaves a hidden name, never a half-empty visible one."""
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
