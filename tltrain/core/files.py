"""Atomic file writes (temporary name, fsync, rename, fsync of the folder), checksums, and reads that end: regular files, bounded waits."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import stat
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar, cast

from tltrain.core.errors import MachineError
from tltrain.core.host.cores import num_cores
from tltrain.core.output import progress

T = TypeVar("T")
R = TypeVar("R")
LOCK_S = 3600.0
"""Longest wait for a lock, seconds: its holder may read all images of a large data set."""
ANSWER_S = 60.0
"""Longest time that a server may send nothing, seconds."""
READ_S = 300.0
"""Longest time that reading one file may take, seconds."""
WAIT_S = 1.0
"""Who waits for another process or a slow disk reports so often, seconds."""


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


def short_name(name: str, most: int = 200) -> str:
    """A name of a file or a folder; one of more than `most` bytes is cut, and ends in a hash of the whole and its suffix."""
    whole = name.encode("utf-8", "surrogateescape")
    if len(whole) <= most:  # file systems take 255, of which locks and temporary files need some
        return name
    suffix = suffix if len(suffix := Path(name).suffix) <= 16 and suffix.isascii() else ""
    digest = hashlib.blake2b(whole, digest_size=8).hexdigest()
    return f"{whole[: most - len(digest) - len(suffix) - 1].decode('utf-8', 'ignore')}-{digest}{suffix}"


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
    """The remedy for a disk that cannot be written."""
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.EPERM, errno.EACCES, errno.EROFS):
        return "This user may not write there (permissions, a read-only disk, or chattr +i): allow it, and start again"
    if code in (errno.ENOENT, errno.ESTALE):
        return "The folder was renamed or deleted: put it back, and start again"
    return "Make room, and start again"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder",
}  # fmt: skip


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Raises OSError; for a folder, device, pipe or socket the message says which it is."""
    _check_regular(path, path.stat().st_mode)  # before opening: opening a device may have side effects
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))  # O_NONBLOCK: opening a pipe must not hang
    file = os.fdopen(handle, "rb")
    try:
        _check_regular(path, os.fstat(handle).st_mode)  # again: the path may have been replaced in between
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises OSError as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """The content of a regular UTF-8 file. Raises OSError as `open_regular`, and UnicodeDecodeError."""
    return read_bytes(path).decode("utf-8")


@contextmanager
def locked(path: Path, what: str, limit_s: float = LOCK_S) -> Iterator[None]:
    """Hold the lock file `path`. Says after a while that another process holds it. Raises MachineError after `limit_s` seconds.

    what: what the other process does, such as `reads the images of folder:x`. A lock ends with its process, also with one that is killed.
    """
    from filelock import FileLock, Timeout  # it imports asyncio, which most commands do without

    lock = FileLock(path)
    try:
        lock.acquire(timeout=min(5.0, limit_s))
    except Timeout:
        sys.stderr.write(f"tltrain: waiting for another process, which {what} (lock {path})\n")
        deadline = time.monotonic() + limit_s
        while not lock.is_locked:
            progress.alive()
            with suppress(Timeout):
                lock.acquire(timeout=max(0.0, min(WAIT_S, deadline - time.monotonic())))
            if not lock.is_locked and time.monotonic() >= deadline:
                raise MachineError(
                    f"another process {what}, and has held {path} for {limit_s / 60:.0f} min; see what holds it (`fuser {path}`), or "
                    "delete it"
                ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def downloading(path: Path, what: str) -> Iterator[None]:
    """As `locked`. Inside, a connection that sends nothing for ANSWER_S raises an OSError, where urllib would wait without end."""
    before = socket.getdefaulttimeout()
    with locked(path, what):
        socket.setdefaulttimeout(ANSWER_S)
        try:
            yield
        finally:
            socket.setdefaulttimeout(before)


def unresolved(url: str) -> str | None:
    """Why the host of a URL cannot be reached, if it has no address here. Libraries would try again for half a minute, and then say less.

    None behind a proxy, which finds the address itself.
    """
    host = urllib.parse.urlsplit(url).hostname or ""
    if urllib.request.getproxies().keys() & {"https", "all"} and not urllib.request.proxy_bypass(host):
        return None
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        return f"{host} has no address here ({error.strerror}): is there a network?"
    return None


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"{KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file", str(path))


def in_parallel(work: Callable[[T], R], items: Sequence[T], limit_s: float = READ_S, num_threads: int | None = None) -> Iterator[R]:
    """The results of work(item), in order, computed on threads that start at once. Raises the error of a call in its place.

    num_threads: as many as there are cores and a few more, unless it is given. Each item costs about a KB, so give a million in parts.
    Raises MachineError if one call takes longer than `limit_s` seconds. Neither an interrupt nor the end of the process waits for a call.
    """
    futures: list[Future[R]] = [Future() for _ in items]
    todo, over = iter(zip(items, futures, strict=True)), threading.Event()
    lock = threading.Lock()

    def take() -> None:
        while not over.is_set():
            with lock:
                item, future = next(todo, (None, None))
            if future is None:
                return
            try:
                future.set_result(work(cast(T, item)))
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)

    for _ in range(min(len(items), num_threads or num_cores() + 4)):
        threading.Thread(target=take, daemon=True, name="tltrain-read").start()  # daemons: a dead network mount holds them for ever
    return _in_order(items, futures, over, limit_s)


def waited(work: Callable[[], R]) -> R:
    """The result of a long call that reports nothing, such as a library's download. It runs on a thread; this one gives signs of life."""
    return next(in_parallel(lambda call: call(), [work], limit_s=math.inf))


def _in_order(items: Sequence[T], futures: Sequence[Future[R]], over: threading.Event, limit_s: float) -> Iterator[R]:
    try:
        for item, future in zip(items, futures, strict=True):
            deadline = time.monotonic() + limit_s
            while not future.done():
                wait([future], max(0.0, min(WAIT_S, deadline - time.monotonic())))
                if not future.done() and time.monotonic() >= deadline:
                    raise MachineError(f"{item} does not answer for {limit_s:.0f} s; look at its disk or network mount")
                progress.alive()
            yield future.result()
    finally:
        over.set()
