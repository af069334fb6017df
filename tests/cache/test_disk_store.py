"""Folders of shards: whole files or none, damage that is seen, disks that are full, several writers at once."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import made_store, names, rows

from tltrain.cache import disk_store
from tltrain.cache.disk_store import Store, stores

DISK_MB = 4


def test_a_shard_comes_back_mapped(tmp_path: Path) -> None:
    with Store(tmp_path, "test", {"number": 1}, {}) as store:
        file = store.write("000000", rows(7))
        assert store.list_shards() == {"000000": file}
        assert store.verify_shard(file)
        assert torch.equal(disk_store.read(file)["rows"], rows(7)["rows"])
        mapped = disk_store.read(file)
        if sys.platform == "linux":
            assert str(file) in Path("/proc/self/maps").read_text()
        assert mapped["rows"].sum() == 700_000
        assert names(store.path) == {file.name, disk_store.ABOUT, disk_store.LOCK}
        assert file.stat().st_mode == (store.path / disk_store.ABOUT).stat().st_mode  # others of the group read it as they read anything


def test_another_key_is_another_folder(tmp_path: Path) -> None:
    a, b = made_store(tmp_path, 1), made_store(tmp_path, 2)
    assert a != b
    assert made_store(tmp_path, 1) == a
    assert [(s.kind, s.key, s.made_by) for s in stores(tmp_path)] == [("test", {"number": n}, {"recipe": "a"}) for n in (2, 1)]
    assert all(100_000 < store.bytes < 101_000 for store in stores(tmp_path))


@pytest.mark.parametrize("spoil", ["flip", "cut", "grow"])
def test_damage_is_seen_and_the_shard_is_gone(tmp_path: Path, spoil: str) -> None:
    with Store(tmp_path, "test", {"number": 1}, {}) as store:
        good, bad = store.write("000000", rows(1)), store.write("000001", rows(2))
        content = bad.read_bytes()
        flipped = content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:]
        bad.write_bytes({"flip": flipped, "cut": content[:-1], "grow": content + b"0"}[spoil])
        assert store.verify_shard(good)
        assert not store.verify_shard(bad)
        assert store.list_shards() == {"000000": good}
        assert store.write("000001", rows(2)) == bad
        assert store.verify_shard(bad)


def test_a_sound_file_that_was_put_there_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one process reads a damaged shard, another makes it again."""
    with Store(tmp_path, "test", {"number": 1}, {}) as store:
        file = store.write("000000", rows(1))
        file.write_bytes(b"damaged")
        digest = hashlib.file_digest

        def slow(*arguments: Any) -> Any:
            found = digest(*arguments)
            monkeypatch.undo()
            store.write("000000", rows(1))
            return found

        monkeypatch.setattr(hashlib, "file_digest", slow)
        store.verify_shard(file)
        assert store.list_shards() == {"000000": file}
        assert store.verify_shard(file)


def test_one_shard_written_by_many_at_once(tmp_path: Path) -> None:
    """As by machines that share a folder, and whose processes have the same number."""
    with Store(tmp_path, "test", {"number": 1}, {}) as store, ThreadPoolExecutor(8) as pool:
        for i in range(10):
            files = set(pool.map(lambda _, i=i: store.write(f"{i:06d}", rows(i)), range(8)))
            assert len(files) == 1
            assert store.verify_shard(files.pop())
        assert len(names(store.path)) == 10 + 2


def test_every_reader_takes_the_same_of_two_files(tmp_path: Path) -> None:
    path = made_store(tmp_path, 1)
    (first,) = path.glob("*.safetensors")
    for i in range(20):
        (path / f"000000.{i:032x}.safetensors").touch()
    assert disk_store.list_shards(path) == {"000000": max([first, path / f"000000.{19:032x}.safetensors"])}


def test_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    path = made_store(tmp_path, 1)
    for name, age_s in (("old", 2 * disk_store.LEFT_OVER_S), ("new", 0)):
        (path / f".{name}.17.tmp").write_bytes(b"half")
        os.utime(path / f".{name}.17.tmp", (time.time() - age_s,) * 2)
    made_store(tmp_path, 1)
    assert {name for name in names(path) if name.startswith(".")} == {".new.17.tmp"}
    assert len(list(path.glob("*.safetensors"))) == 1


def test_a_full_disk_leaves_no_half_shard(disk: Path) -> None:
    with Store(disk, "test", {"number": 1}, {}) as store:
        written = []
        with pytest.raises(OSError, match="No space left"):  # noqa: PT012
            for i in range(5):
                written.append(store.write(f"{i:06d}", rows(i, 1_000_000)))
        assert 3 <= len(written) < 5
        assert names(store.path) == {disk_store.ABOUT, disk_store.LOCK, *(file.name for file in written)}
        assert all(map(store.verify_shard, written))
        written[0].unlink()
        assert store.verify_shard(store.write("000003", rows(3, 1_000_000)))


def test_a_shard_that_does_not_reach_the_disk_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS says only at fsync that the disk is full."""

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Store(tmp_path, "test", {"number": 1}, {}) as store:
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            store.write("000000", rows(1))
        assert names(store.path) == {disk_store.ABOUT, disk_store.LOCK}


def test_a_store_that_cannot_be_begun_is_not_held(disk: Path) -> None:
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    handles = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left"):
        Store(disk, "test", {"number": 1}, {})
    assert len(os.listdir("/proc/self/fd")) == handles
    (disk / "ballast").unlink()
    made_store(disk, 1)
