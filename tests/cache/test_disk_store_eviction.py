"""Eviction of stores: the longest unused first, never one that a process has open, at whatever moment."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shard_files import made_store, names, rows

from tltrain.cache import disk_store
from tltrain.cache.disk_store import Store, make_room, remove, stores

ROOT = Path(__file__).resolve().parents[2]

OTHER = """
import json, sys
from pathlib import Path
from tltrain.cache import disk_store as shards

opened = None
for line in sys.stdin:
    word, *arguments = json.loads(line)
    if word == "open":
        opened = shards.Store(Path(arguments[0]), "test", {"number": arguments[1]}, {})
    elif word == "close":
        opened.close()
    elif word == "evict":  # as fast as can be, until a file says stop
        number = 0
        while not Path(arguments[1]).exists():
            number += sum(shards.remove(store) for store in shards.stores(Path(arguments[0])))
        print(number)
    print("done", flush=True)
"""


class Other:
    """Another process that holds a store open, or evicts."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def begin(self, *words: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([*map(_plain, words)]) + "\n")
        self.process.stdin.flush()

    def end(self) -> list[str]:
        assert self.process.stdout is not None
        return list(itertools.takewhile(lambda line: line != "done\n", self.process.stdout))

    def does(self, *words: Any) -> None:
        self.begin(*words)
        self.end()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def _plain(word: Any) -> Any:
    return str(word) if isinstance(word, Path) else word


@pytest.fixture
def other() -> Iterator[Other]:
    process = Other()
    yield process
    process.kill()


def test_a_store_that_is_open_is_not_removed(tmp_path: Path, other: Other) -> None:
    path = made_store(tmp_path, 1)
    other.does("open", tmp_path, 1)
    (store,) = stores(tmp_path)
    assert not remove(store)
    assert len(disk_store.list_shards(path)) == 1
    with Store(tmp_path, "test", {"number": 1}, {}):
        other.does("close")
        assert not remove(store)  # nor one's own
    assert remove(store)
    assert names(tmp_path) == set()
    assert remove(store)  # gone already


def test_a_process_that_is_killed_holds_nothing(tmp_path: Path, other: Other) -> None:
    made_store(tmp_path, 1)
    other.does("open", tmp_path, 1)
    (store,) = stores(tmp_path)
    assert not remove(store)
    other.kill()
    assert remove(store)


def test_room_is_made_of_what_was_unused_longest(tmp_path: Path, other: Other) -> None:
    paths = [made_store(tmp_path, n, age_s=100 * age) for n, age in enumerate((4, 2, 5, 3))]
    size = stores(tmp_path)[0].bytes
    assert [store.path for store in stores(tmp_path)] == [paths[n] for n in (2, 0, 3, 1)]
    other.does("open", tmp_path, 0)  # which makes it the one used last, and nobody may have it
    os.utime(paths[0] / disk_store.LOCK, (time.time() - 450,) * 2)
    keep = tmp_path / "test-new"
    assert make_room(tmp_path, size, 5 * size, keep)
    assert len(stores(tmp_path)) == 4  # it fits as it is
    assert make_room(tmp_path, size, 4 * size, keep)
    assert {store.path for store in stores(tmp_path)} == {paths[0], paths[1], paths[3]}  # the oldest went
    assert make_room(tmp_path, size, 3 * size, keep)
    assert {store.path for store in stores(tmp_path)} == {paths[0], paths[1]}  # the oldest but the one that is open
    assert not make_room(tmp_path, size, size, keep)
    assert {store.path for store in stores(tmp_path)} == {paths[0], paths[1]}  # not enough: nothing went in vain
    assert not make_room(tmp_path, 6 * size, 5 * size, keep)
    other.does("close")
    assert make_room(tmp_path, size, size, keep)
    assert names(tmp_path) == set()


def test_the_store_that_room_is_made_for_stays(tmp_path: Path) -> None:
    older, newer = made_store(tmp_path, 1, num_shards=2, age_s=100), made_store(tmp_path, 2)
    size = stores(tmp_path)[-1].bytes
    assert make_room(tmp_path, 3 * size, 3 * size, keep=older)
    assert names(tmp_path) == {older.name}
    assert not newer.exists()


def test_what_a_killed_eviction_left_is_swept_and_is_no_store(tmp_path: Path) -> None:
    path = made_store(tmp_path, 1)
    path.rename(left := tmp_path / f".{path.name}.17.old")
    assert stores(tmp_path) == []
    assert make_room(tmp_path, 1, 10**9, tmp_path / "test-new")
    assert not left.exists()


def test_a_store_that_was_made_anew_meanwhile_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between this process's opening of the lock and its locking, another one evicts the store, and a third makes it again."""
    path = made_store(tmp_path, 1)
    (listed,) = stores(tmp_path)
    real: Callable[[int, int], bool] = disk_store._lock
    anew: list[Store] = []

    def late(handle: int, how: int) -> bool:
        monkeypatch.setattr(disk_store, "_lock", real)
        assert remove(listed)
        anew.append(Store(tmp_path, "test", {"number": 1}, {}))
        anew[0].write("000000", rows(1))
        return real(handle, how)

    monkeypatch.setattr(disk_store, "_lock", late)
    assert not remove(listed)
    assert len(disk_store.list_shards(path)) == 1
    anew[0].close()


def test_a_lock_on_what_was_evicted_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, for a process that opens a store to use it."""
    made_store(tmp_path, 1)
    (listed,) = stores(tmp_path)
    real: Callable[[int, Path], None] = disk_store._wait_for_lock

    def late(handle: int, path: Path) -> None:
        monkeypatch.setattr(disk_store, "_wait_for_lock", real)
        assert remove(listed)
        made_store(tmp_path, 1)
        real(handle, path)

    monkeypatch.setattr(disk_store, "_wait_for_lock", late)
    with Store(tmp_path, "test", {"number": 1}, {}):
        assert not remove(listed)


def test_a_store_is_never_evicted_between_opening_and_use(tmp_path: Path, other: Other) -> None:
    other.does("open", tmp_path / "others", 1)  # it is awake
    other.begin("evict", tmp_path / "stores", tmp_path / "stop")
    for i in range(150):
        with Store(tmp_path / "stores", "test", {"number": 1}, {}) as store:
            file = store.write("000000", rows(i))
            assert store.list_shards()["000000"].exists()
            assert store.verify_shard(file)
            assert (store.path / disk_store.ABOUT).exists()
        time.sleep(0.002)  # for the other to evict it
    (tmp_path / "stop").touch()
    assert int(other.end()[0]) > 10


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Lustre without flock: stores are used there, and never evicted, because nobody knows who reads them."""

    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    path = made_store(tmp_path, 1)
    assert not remove(stores(tmp_path)[0])
    assert not make_room(tmp_path, 10, 10, tmp_path / "test-new")
    assert len(disk_store.list_shards(path)) == 1


def test_a_lock_that_another_process_keeps_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run then computes on the fly: the error is an OSError, as that of a full disk."""
    monkeypatch.setattr(disk_store, "LOCK_S", 0.2)
    path = made_store(tmp_path, 1)
    with (path / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="locked by another process"):
            Store(tmp_path, "test", {"number": 1}, {})
    Store(tmp_path, "test", {"number": 1}, {}).close()
