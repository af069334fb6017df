"""Stores on disk: folders of shard files that can be computed again. The least recently used are deleted when the disk budget is full.

A shard is written atomically, and its name holds its checksum. A store's folder is named by the hash of its key, which holds everything
that decides its bytes. So a store never becomes stale: a changed key names another folder.
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
LOCK_S = 60.0  # longest wait for a store's lock
LEFT_OVER_S = 3600.0  # a temporary file that is older belongs to a killed process
NOT_LOCKED = (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


class Store:
    """One open store. It cannot be evicted while it is open. Any number of processes may fill it at the same time."""

    def __init__(self, root: Path, kind: str, key: dict[str, Any], made_by: dict[str, Any]) -> None:
        """Open a store, and create it if absent. Raises OSError if it cannot be written.

        root: the folder of all stores. key: JSON values that decide the store's bytes. made_by: what is needed to compute the store again;
        it is recorded but not compared.
        """
        self.path = root / f"{kind}-{digest(key)}"
        self.handle = _lock_shared(self.path)
        try:
            if not (self.path / ABOUT).exists():
                files.write_json(self.path / ABOUT, {"kind": kind, "key": key, "made_by": made_by})
        except OSError:
            self.close()
            raise
        for temporary in self.path.glob(".*.tmp"):
            with suppress(OSError):  # already gone, or another user's
                if time.time() - temporary.stat().st_mtime > LEFT_OVER_S:
                    temporary.unlink()

    def list_shards(self) -> dict[str, Path]:
        """Name to file of every shard on disk. `verify_shard` checks a shard's bytes."""
        return list_shards(self.path)

    def verify_shard(self, file: Path) -> bool:
        """Whether a shard's bytes match its checksum. A damaged shard is deleted, since it can be computed again."""
        with _gone_already(), files.open_regular(file) as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest()[:32] == file.name.split(".")[1]:
                return True
            if os.path.samestat(os.fstat(opened.fileno()), file.stat()):  # unless another process has replaced it meanwhile
                file.unlink()
        return False

    def write(self, name: str, tensors: dict[str, Tensor]) -> Path:
        """Write a shard atomically: temporary name, fsync, rename. The final name holds the checksum. Raises OSError."""
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
    """Name to file of every shard in a store's folder. If a shard exists twice with different bytes, every reader gets the same file."""
    return {file.name.partition(".")[0]: file for file in sorted(path.glob("*.safetensors"))}


def read(file: Path) -> dict[str, Tensor]:
    """A shard's tensors, memory-mapped."""
    return load_file(file)


def digest(key: dict[str, Any]) -> str:
    """Hash of a key, as it stands in folder names."""
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=10).hexdigest()


@dataclass(frozen=True)
class StoreInfo:
    """A description of one store on disk."""

    path: Path
    kind: str
    key: dict[str, Any]
    made_by: dict[str, Any]
    bytes: int
    used: float
    """When it was last opened, seconds since the epoch."""


def stores(root: Path) -> list[StoreInfo]:
    """Every store below `root`, the least recently used first."""
    infos = []
    for about in root.glob(f"[!.]*/{ABOUT}"):
        with suppress(OSError):  # already gone, or another user's
            size = sum(path.stat().st_size for path in about.parent.glob("*.safetensors"))
            used = (about.parent / LOCK).stat().st_mtime
            infos.append(StoreInfo(about.parent, *_about(about), size, used))
    return sorted(infos, key=lambda store: store.used)


def _about(file: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(kind, key, made_by). If the file is missing or invalid, the kind from the folder's name, so the store can be listed and removed."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        kind, key, made_by = raw["kind"], raw["key"], raw["made_by"]
        if isinstance(kind, str) and isinstance(key, dict) and isinstance(made_by, dict):
            return kind, key, made_by
    return file.parent.name.rpartition("-")[0], {}, {}


def owned_by_other(path: Path) -> str | None:
    """The owner of a store that this process may not delete; None if it may."""
    try:
        owner, root, me = path.stat().st_uid, path.parent.stat(), os.geteuid()
    except FileNotFoundError:  # already gone
        return None
    sticky = root.st_mode & stat.S_ISVTX and me not in (0, owner, root.st_uid)
    if not sticky and os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return None
    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return f"user {owner}"


def remove(store: StoreInfo) -> bool:
    """Delete a store. Returns False, with no change, if a process has it open. Raises OSError if it is another user's."""
    with _lock_exclusive(store.path) as locked:
        if not locked:
            return not store.path.exists()
        hidden = _hide(store.path)
    _delete(hidden)
    return True


def make_room(root: Path, needed: int, limit: int, keep: Path) -> bool:
    """Delete stores, the least recently used first, until `needed` bytes fit under `limit`. If they cannot, returns False, deletes none.

    needed: the size of the store `keep` once it is full, including what is already written.
    """
    for partial in root.glob(".*.old"):  # a process was killed while it deleted this
        _delete(partial)
    others = [store for store in stores(root) if store.path != keep]
    too_many = sum(store.bytes for store in others) + needed - limit
    # Lock the stores to delete before any is deleted: if the locked ones do not free enough, all stay.
    with ExitStack() as locks:
        unused: list[Path] = []
        for store in others if needed <= limit else ():
            if too_many > 0 and owned_by_other(store.path) is None and locks.enter_context(_lock_exclusive(store.path)):
                unused.append(store.path)
                too_many -= store.bytes
        if too_many > 0:
            return False
        hidden = [_hide(path) for path in unused]
    # The locks are released before the slow part: no process finds a hidden store.
    for folder in hidden:
        _delete(folder)
    return True


def default_limit(root: Path) -> int:
    """The default disk budget of all stores, bytes: half of the free space plus what the stores already take."""
    return (shutil.disk_usage(root).free + sum(store.bytes for store in stores(root))) // 2


def _lock_shared(path: Path) -> int:
    """A file handle with a shared lock on a store's folder, which is created if absent."""
    while True:  # again if another process evicts the folder between two of these calls
        path.mkdir(parents=True, exist_ok=True)
        with _gone_already():
            handle = _open_lock(path / LOCK, os.O_CREAT)
            try:
                _wait_for_lock(handle, path)
                with suppress(PermissionError):  # another user's store
                    os.utime(path / LOCK)
                if _is_at(handle, path / LOCK):
                    return os.dup(handle)
            finally:
                os.close(handle)


def _open_lock(file: Path, flags: int = 0) -> int:
    """Open a lock file. Another user's is opened read-only, since a lock needs no write permission."""
    try:
        return os.open(file, os.O_RDWR | flags, 0o666)
    except PermissionError:
        return os.open(file, os.O_RDONLY)


@contextmanager
def _lock_exclusive(path: Path) -> Iterator[bool]:
    """Yields whether the store is locked exclusively: no process has it open, and none can open it inside the block.

    Yields False if the lock cannot be taken for any reason.
    """
    try:
        handle = _open_lock(path / LOCK)
    except OSError:  # gone, or another user's and unreadable
        yield False
        return
    try:
        yield _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) and _is_at(handle, path / LOCK)
    finally:
        os.close(handle)


def _wait_for_lock(handle: int, path: Path) -> None:
    """Take a shared lock. A process that deletes a store locks it exclusively for a moment. Raises OSError if that takes LOCK_S seconds."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                if error.errno not in NOT_LOCKED:
                    raise
                return None  # the file system has no locks
            if time.monotonic() > deadline:
                raise OSError(errno.EWOULDBLOCK, f"locked by another process for {LOCK_S:.0f} s", str(path / LOCK)) from None
        time.sleep(0.02)


def _lock(handle: int, how: int) -> bool:
    """Take a lock. False if another process holds it or the file system has no locks. Stores on such a file system are never evicted."""
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in NOT_LOCKED:
            raise
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the file at `path`. Another process may have evicted its folder and created a new one."""
    with _gone_already():
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _hide(path: Path) -> Path:
    """Rename a store to a name that no process opens. Returns the new path."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}.old")
    path.rename(hidden)
    return hidden


def _delete(hidden: Path) -> None:
    shutil.rmtree(hidden, ignore_errors=True)  # two processes may do this at once; make_room deletes any remainder


def _gone_already() -> suppress:
    """Ignore files that another process has evicted or replaced meanwhile."""
    return suppress(FileNotFoundError)
