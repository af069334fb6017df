"""A cache that several users share, and what stands in it that is none of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from other_user import another_user, readable_folder
from shard_files import made_store, rows

from tltrain.cache import disk_store
from tltrain.cache.disk_store import Store
from tltrain.cli.main import main
from tltrain.commands import cache as stored


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with readable_folder() as folder:
        monkeypatch.setenv("TLTRAIN_CACHE", str(folder))
        (folder / "store").mkdir()
        yield folder


def test_the_store_of_another_user_is_read_and_kept(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made_store(cache / "store", 1, age_s=3600)
    cache.chmod(0o777)  # the cache is for all, the store is not
    (cache / "store").chmod(0o777)
    owner = path.owner()
    with another_user(path):
        with Store(cache / "store", "test", {"number": 1}, {}) as store:
            (file,) = store.list_shards().values()
            assert store.verify_shard(file)
            assert torch.equal(disk_store.read(file)["rows"], rows(0)["rows"])
            with pytest.raises(PermissionError):
                store.write("000001", rows(1))
        assert main(["cache", "ls"]) == 0
        said = capsys.readouterr().out
        assert "in use" not in said
        assert said.splitlines()[0].endswith(f", of {owner}")
        assert main(["cache", "clear", path.name]) == 1
        assert f"{path.name}, which only {owner} can delete" in capsys.readouterr().out
        assert main(["cache", "clear", "--all"]) == 0
        assert "0 in use, 1 of others" in capsys.readouterr().out
        assert not disk_store.make_room(cache / "store", 0, 1, cache / "other"), "it is nobody's room to take"
    assert path.is_dir()


def test_a_store_that_another_user_has_open_is_in_use(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.chmod(0o777)
    with Store(cache / "store", "test", {"number": 1}, {}) as store, another_user(store.path):
        assert main(["cache", "ls"]) == 0
    assert "in use, of" in capsys.readouterr().out


def test_a_store_is_for_the_group_where_the_umask_says_so(cache: Path) -> None:
    before = os.umask(0o002)
    try:
        path = made_store(cache / "store", 1)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o775
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o664}


ODD = [
    "", "[]", "7", "null", "{}", "[" * 100_000, '{"kind": 1, "key": [], "made_by": "x"}', '{"kind": "test", "key": {}, "made_by": {}}',
    '{"kind": "test", "key": {}, "made_by": {"split": "train", "recipe": []}}',
    '{"kind": "test", "key": {}, "made_by": {"split": "train", "recipe": {"name": "a", "stages": []}, "stage": 3}}',
    '{"kind": "../x", "key": {}, "made_by": {"split": "\\u001b[2J\\n", "recipe": {"name": {"a": 1}}}}',
]  # fmt: skip


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_one_odd_about_ends_nobodys_run_and_no_command(text: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd, good = made_store(cache / "store", 1, age_s=3600), made_store(cache / "store", 2)
    (odd / disk_store.ABOUT).write_text(text)
    assert {each.path for each in disk_store.stores(cache / "store")} == {odd, good}
    assert main(["cache", "ls"]) == 0
    assert main(["cache", "ls", "--json"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "2 caches" in said
    assert main(["cache", "verify", "--rows", "1", odd.name]) == 1
    assert f"does not say what this is; remove it: tltrain cache clear {odd.name}" in capsys.readouterr().out
    assert disk_store.make_room(cache / "store", 0, 150_000, cache / "other"), "it makes room as any other"
    assert [each.path for each in disk_store.stores(cache / "store")] == [good]


def test_an_about_of_the_right_name_that_does_not_say_how_is_no_error(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made_store(cache / "store", 1)
    about = json.loads((path / disk_store.ABOUT).read_text())
    (path / disk_store.ABOUT).write_text(json.dumps({**about, "made_by": {}}))
    assert stored.verify([path.name], 1, 0) == 0
    assert "about.json does not say how they were made" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["fifo", "folder", "unreadable"])
def test_an_about_that_is_no_file_is_not_waited_for(kind: str, cache: Path) -> None:
    path = made_store(cache / "store", 1)
    (path / disk_store.ABOUT).unlink()
    if kind == "fifo":
        os.mkfifo(path / disk_store.ABOUT)
    elif kind == "folder":
        (path / disk_store.ABOUT).mkdir()
    else:
        (path / disk_store.ABOUT).write_text("{}")
        (path / disk_store.ABOUT).chmod(0)
    with another_user(path):
        (found,) = disk_store.stores(cache / "store")
    assert (found.kind, found.key) == ("test", {})
