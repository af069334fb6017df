"""Stores on disk: folders of files that can be made again, each written whole, named by its own checksum, evicted by a size limit.

A store's folder is named by the hash of its key: everything that decides what its bytes are. Another key is another folder,
so that nothing in it is ever out of date.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pwd
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save
from torch import Tensor

from tltrain.core import files

ABOUT, LOCK = "about.json", "lock"
LEFT_OVER_S = 3600.0  # a temporary file that nobody has touched for so long was left by a killed process
NOT_LOCKED = (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


class Store:
    """One store, held open: nobody evicts it meanwhile. Any number of processes may fill the same one at the same time."""

    def __init__(self, root: Path, kind: str, key: dict[str, Any], made_by: dict[str, Any]) -> None:
        """root: the folder of all stores. key: JSON values; made_by: what could make the same bytes again, kept and not compared."""
        self.path = root / f"{kind}-{digest(key)}"
        self.handle = _lock_shared(self.path)
        try:
            if not (self.path / ABOUT).exists():
                files.write_json(self.path / ABOUT, {"kind": kind, "key": key, "made_by": made_by})
        except OSError:
            self.close()
            raise
        for left in self.path.glob(".*.tmp"):
            with suppress(OSError):  # gone already, or another user's
                if time.time() - left.stat().st_mtime > LEFT_OVER_S:
                    left.unlink()

    def list_shards(self) -> dict[str, Path]:
        """Name to file of every shard that is there; whether its bytes are sound says `sound`."""
        return list_shards(self.path)

    def verify_shard(self, file: Path) -> bool:
        """Whether a shard's bytes are those that were written. A damaged one is removed: it can be made again."""
        with _gone_already(), file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest()[:32] == file.name.split(".")[1]:
                return True
            if os.path.samestat(os.fstat(opened.fileno()), file.stat()):  # not what another process has put there meanwhile
                file.unlink()
        return False

    def write(self, name: str, tensors: dict[str, Tensor]) -> Path:
        """Write a shard: temporary name, fsync, rename. The checksum is part of the final name. Raises OSError."""
        content = save(tensors)
        final = self.path / f"{name}.{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        with files.replacing(final) as temporary:
            temporary.write_bytes(content)
        return final

    def close(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def list_shards(path: Path) -> dict[str, Path]:
    """Name to file of every shard in a store's folder, the same file for every reader where one was made twice with different bytes."""
    return {file.name.partition(".")[0]: file for file in sorted(path.glob("*.safetensors"))}


def read(file: Path) -> dict[str, Tensor]:
    """A shard's tensors, memory-mapped."""
    return load_file(file)


def digest(key: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=10).hexdigest()


@dataclass(frozen=True)
class Standing:
    """A store as it lies on the disk."""

    path: Path
    kind: str
    key: dict[str, Any]
    made_by: dict[str, Any]
    bytes: int
    num_shards: int
    used: float
    """Seconds since the epoch at which it was last opened."""


def stores(root: Path) -> list[Standing]:
    """Every store below `root`, the one that was used longest ago first."""
    found = []
    for about in root.glob(f"[!.]*/{ABOUT}"):
        with suppress(OSError):  # gone already, or another user's
            size = sum(sizes := [path.stat().st_size for path in about.parent.glob("*.safetensors")])
            used = (about.parent / LOCK).stat().st_mtime
            found.append(Standing(about.parent, *_about(about), size, len(sizes), used))
    return sorted(found, key=lambda store: store.used)


def _about(file: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(kind, key, made_by). Of a file that does not say them, the folder's kind alone: such a store is listed and removed as any other."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        kind, key, made_by = raw["kind"], raw["key"], raw["made_by"]
        if isinstance(kind, str) and isinstance(key, dict) and isinstance(made_by, dict):
            return kind, key, made_by
    return file.parent.name.rpartition("-")[0], {}, {}


def owned_by_other(path: Path) -> str | None:
    """Whose a store is that this process may not delete; None for one that it may."""
    try:
        owner, root, me = path.stat().st_uid, path.parent.stat(), os.geteuid()
    except FileNotFoundError:  # gone already
        return None
    sticky = root.st_mode & stat.S_ISVTX and me not in (0, owner, root.st_uid)
    if not sticky and os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return None
    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return f"user {owner}"


def remove(store: Standing) -> bool:
    """Delete a store; False, and nothing done, where a process has it open. Raises OSError for one that `owned_by_other` names."""
    with _lock_exclusive(store.path) as alone:
        if not alone:
            return not store.path.exists()
        hidden = _hide(store.path)
    _delete(hidden)
    return True


def make_room(root: Path, needed: int, limit: int, keep: Path) -> bool:
    """Delete stores, the longest unused first, until `needed` bytes fit under `limit`. False, and nothing deleted, where they cannot.

    keep: the store that the bytes are for; needed: all of its bytes, those that stand included.
    """
    for left in root.glob(".*.old"):  # a process was killed while it deleted
        _delete(left)
    others = [store for store in stores(root) if store.path != keep]
    too_many = sum(store.bytes for store in others) + needed - limit
    with ExitStack() as locks:
        unused: list[Path] = []
        for store in others if needed <= limit else ():
            if too_many > 0 and owned_by_other(store.path) is None and locks.enter_context(_lock_exclusive(store.path)):
                unused.append(store.path)
                too_many -= store.bytes
        if too_many > 0:
            return False
        hidden = [_hide(path) for path in unused]
    for folder in hidden:
        _delete(folder)
    return True


def default_limit(root: Path) -> int:
    """Bytes that all stores together may take where nothing is said: half of what is free or theirs already."""
    return (shutil.disk_usage(root).free + sum(store.bytes for store in stores(root))) // 2


def _lock_shared(path: Path) -> int:
    """An open handle with a shared lock on a store's folder, which is made if absent."""
    while True:  # until it is not evicted between two of these calls
        path.mkdir(parents=True, exist_ok=True)
        with _gone_already():
            handle = _open_lock(path / LOCK, os.O_CREAT)
            try:
                _lock(handle, fcntl.LOCK_SH)
                with suppress(PermissionError):  # of another user, whose store it stays
                    os.utime(path / LOCK)
                if _is_at(handle, path / LOCK):
                    return os.dup(handle)
            finally:
                os.close(handle)


def _open_lock(file: Path, flags: int = 0) -> int:
    """A lock file to be locked, which needs no right to write: that of another user's store is only read."""
    try:
        return os.open(file, os.O_RDWR | flags, 0o666)
    except PermissionError:
        return os.open(file, os.O_RDONLY)


@contextmanager
def _lock_exclusive(path: Path) -> Iterator[bool]:
    """Whether no other process has a store open; inside, none can open it. False as well where that cannot be known."""
    try:
        handle = _open_lock(path / LOCK)
    except OSError:  # gone, or another user's who lets nobody read it
        yield False
        return
    try:
        yield _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) and _is_at(handle, path / LOCK)
    finally:
        os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """False where another process has the lock, or where the file system has none: a store there is used, and never evicted."""
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in NOT_LOCKED:
            raise
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name: meanwhile another process may have evicted its folder and made a new one."""
    with _gone_already():
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _hide(path: Path) -> Path:
    """Take a store away under a name that nobody opens, in one step."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}.old")
    path.rename(hidden)
    return hidden


def _delete(hidden: Path) -> None:
    shutil.rmtree(hidden, ignore_errors=True)  # two processes may do it at once; what is left, make_room deletes the next time


def _gone_already() -> suppress:
    """Another process may evict or replace what this one looks at."""
    return suppress(FileNotFoundError)
