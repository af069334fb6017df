"""webdataset:GLOB: shards that webdataset's own writer makes, where it is installed, and that tarfile makes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from container_files import Row, digit_rows, expected, looks, opened, tar_file

from tltrain.core.errors import UserError
from tltrain.data.containers.contents import Contents


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _cls(rows: Iterable[Row]) -> list[tuple[str, bytes]]:
    """Samples with a number as their class, as most shards have them."""
    return [pair for i, row in enumerate(rows) for pair in ((f"{i:04}.png", row.content), (f"{i:04}.cls", str(row.label).encode()))]


def _of(split: str) -> list[Row]:
    return [row for row in digit_rows() if row.split == split]


def _shards(root: Path) -> str:
    tar_file(root / "digits-train-000.tar", _cls(_of("train")[0::2]))
    tar_file(root / "digits-train-001.tar", _cls(_of("train")[1::2]))
    tar_file(root / "digits-val-000.tar", _cls(_of("val")))
    tar_file(root / "digits-test-000.tar", _cls(_of("test")))
    return f"webdataset:{root}/*.tar"


def _refused(source: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        opened(source)


def test_shards_have_their_own_splits(tmp_path: Path) -> None:
    images = opened(_shards(tmp_path))
    assert images.classes == ("0", "1", "2")
    for split, name in ((images.train, "train"), (images.val, "val"), (images.test, "test")):
        assert looks(split) == expected(name)
    assert "splits by the names of the files: 2 train, 1 val, 1 test" in images.notes
    assert images.train.ids[0] == "digits-train-000.tar/0000.png"


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    for split in ("train", "val", "test"):
        with webdataset.ShardWriter(str(tmp_path / f"{split}-%04d.tar"), maxcount=10, verbose=0) as writer:
            for i, row in enumerate(_of(split)):
                writer.write({"__key__": f"{split}/{i:03}", "png": row.content, "cls": row.label})
    images = opened(f"webdataset:{tmp_path}/*.tar")
    assert looks(images.train) == expected("train")
    assert looks(images.test) == expected("test")


@pytest.mark.parametrize("said", [{"label": 2}, {"Class": 2}, {"class_name": "2", "width": 5}])
def test_a_json_says_the_class_too(tmp_path: Path, said: dict[str, Any]) -> None:
    rows = [(f"a/{i}.{kind}", content) for i, row in enumerate(_of("train")) for kind, content in (
        ("png", row.content), ("json", json.dumps({key: type(v)(row.label) if v in (2, "2") else v for key, v in said.items()}).encode())
    )]  # fmt: skip
    images = opened(f"webdataset:{tar_file(tmp_path / 'x.tar', rows)}", test_fraction=0, val_fraction=0)
    assert looks(images.train) == expected("train")


def test_a_range_of_shards_is_complete_or_refused(tmp_path: Path) -> None:
    _shards(tmp_path)
    one = opened(f"webdataset:{tmp_path}/digits-train-{{000..001}}.tar", test_fraction=0, val_fraction=0)
    assert len(one.train) == len(_of("train"))
    _refused(f"webdataset:{tmp_path}/digits-train-{{000..003}}.tar", r"2 of its 4 files cannot be found: .*train-002.tar, .*train-003.tar")


def test_classes_that_are_numbers_stand_in_their_order(tmp_path: Path) -> None:
    rows = [row._replace(label=row.label * 5) for row in _of("train")]
    images = opened(f"webdataset:{tar_file(tmp_path / 'x.tar', _cls(rows))}", test_fraction=0, val_fraction=0)
    assert images.classes == ("0", "5", "10")


def test_a_changed_shard_is_read_anew_and_the_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tltrain.data.containers import webdataset

    source = _shards(tmp_path)
    first = opened(source)
    looked: list[str] = []
    look = webdataset.look_through

    def noted(file: Path) -> Contents:
        looked.append(file.name)
        return look(file)

    monkeypatch.setattr(webdataset, "look_through", noted)
    assert opened(source).fingerprint == first.fingerprint
    assert looked == []
    tar_file(tmp_path / "digits-val-000.tar", _cls(_of("val")[:-1]))
    assert opened(source).fingerprint != first.fingerprint
    assert looked == ["digits-val-000.tar"]


def test_what_is_broken_is_refused_in_one_message(tmp_path: Path) -> None:
    rows = _of("train")
    short = tar_file(tmp_path / "short" / "train.tar", _cls(rows))
    short.write_bytes(short.read_bytes()[:20_000])
    _refused(f"webdataset:{short}", r"train.tar is not a whole tar archive")
    bare = tar_file(tmp_path / "bare" / "x.tar", [*_cls(rows), ("lonely.png", rows[0].content)])
    _refused(f"webdataset:{bare}", r"x.tar: 1 of 25 images have no class, such as lonely.png; each needs a .cls")
    twice = tar_file(tmp_path / "twice" / "x.tar", [*_cls(rows), ("0000.jpg", rows[0].content)])
    _refused(f"webdataset:{twice}", r"sample 0000 has two images, 0000.png and 0000.jpg")
    json_ = tar_file(tmp_path / "json" / "x.tar", [("0.png", rows[0].content), ("0.json", b"{")])
    _refused(f"webdataset:{json_}", r"0.json cannot be read as JSON")
    _refused(
        f"webdataset:{tmp_path}/none-*.tar", r"no file is there; give a file, a folder, or a pattern such as webdataset:'data/train-\*.tar'"
    )
    _refused(f"webdataset:{tar_file(tmp_path / 'text' / 'x.tar', [('a.txt', b'')])}", r"holds no image \(.jpg .jpeg .png .webp\)")


def test_a_class_that_train_does_not_have_and_splits_that_are_not_clear_are_refused(tmp_path: Path) -> None:
    source = _shards(tmp_path)
    tar_file(tmp_path / "digits-test-001.tar", [("x.png", digit_rows()[0].content), ("x.cls", b"7")])
    _refused(source, r"no readable training image of class 7; add some, or take the class out of every split")
    (tmp_path / "digits-test-001.tar").rename(tmp_path / "more.tar")
    _refused(source, r"some files are called like a split, and these are not: more.tar")
    _refused(f"webdataset:{tmp_path}/*-test-*.tar", r"no file is called train, only test")
