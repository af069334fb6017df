"""Atomic file writes (temporary name, fsync, rename, fsync of the folder), checksums, and reading of regular files."""

from __future__ import annotations

import errno
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
    """A temporary path to write to. It replaces `path` when the block ends without an error.

    A reader sees either the old content or the new content, also after a crash at any moment.
    synced: wait until the new content is on the disk. Without it, a crash of the machine may lose the new content.
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
    """A random hidden name beside `path`. A process id would not be unique, because several machines may share the folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def is_temporary(path: Path, of: Path) -> bool:
    """Whether a path is a temporary file that an interrupted write of `of` left behind."""
    return path.parent == of.parent and path.name.startswith(f".{of.name}.") and path.suffix == ".tmp"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically, and wait until it is on the disk."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def replace_text(path: Path, text: str) -> None:
    """As write_atomic, without waiting for the disk. For heartbeats, which only matter while the machine is up."""
    with replacing(path, synced=False) as temporary:
        temporary.write_text(text)


def write_json_once(path: Path, value: Any) -> bool:
    """Create a JSON file atomically unless it exists already. Returns whether it was created: the first writer wins."""
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
    """Write a value as JSON, atomically. NaN and infinity are written as Python writes them."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=True) + "\n"
    write_atomic(path, text.encode("utf-8", "backslashreplace"))  # a file name that is not UTF-8 becomes \udcff, a valid JSON escape


def commit_folder(temporary: Path, final: Path) -> None:
    """Sync every file of a finished folder to the disk, then rename the folder to its final name."""
    for path in temporary.rglob("*"):
        if path.is_file():
            sync(path)
    sync(temporary)
    temporary.rename(final)
    sync(final.parent)


def follow_umask(path: Path) -> None:
    """Give a file the permissions that new files get here. safetensors makes its files readable by their owner only."""
    probe = temporary_for(path)
    probe.touch(exist_ok=False)
    path.chmod(stat.S_IMODE(probe.stat().st_mode))
    probe.unlink()


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It is renamed to a hidden name first, so that a crash leaves no half-empty folder under the visible name."""
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def remedy(error: BaseException) -> str:
    """What a person can do about a disk that refused."""
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.EPERM, errno.EACCES, errno.EROFS):
        return "This user may not write there (permissions, a read-only disk, or chattr +i): allow it, and start again"
    if code in (errno.ENOENT, errno.ESTALE):
        return "The folder was renamed or deleted: put it back, and start again"
    return "Make room, and start again"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder",
}  # fmt: skip


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises OSError; for a folder, device, pipe or socket the message says which it is."""
    _check_regular(path.stat().st_mode)  # before opening: opening a device may have side effects
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))  # O_NONBLOCK: opening a pipe must not hang
    with os.fdopen(handle, "rb") as file:
        _check_regular(os.fstat(handle).st_mode)  # again: the path may have been replaced in between
        return file.read()


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(f"{KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")
