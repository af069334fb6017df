"""lmdb:PATH on databases that lmdb itself writes."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from container_files import Row, digit_rows, expected, looks, opened

from tltrain.core.errors import UserError

lmdb = pytest.importorskip("lmdb")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _database(folder: Path, pairs: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), map_size=2**24, **options) as database, database.begin(write=True) as transaction:
        for key, value in pairs:
            transaction.put(key.encode(), value)
    return folder


def _numbered(rows: Iterable[Row]) -> list[tuple[str, bytes]]:
    """Images and classes under keys of their own, as the data sets of text recognition have them."""
    rows = list(rows)
    images = [(f"image-{i:09d}", row.content) for i, row in enumerate(rows, 1)]
    labels = [(f"label-{i:09d}", str(row.label).encode()) for i, row in enumerate(rows, 1)]
    return [*images, *labels, ("num-samples", str(len(rows)).encode())]


def _of(split: str) -> list[Row]:
    return [row for row in digit_rows() if row.split == split]


def _as_paths() -> list[tuple[str, bytes]]:
    return [(f"{row.split}/digit {row.label}/{i:03}.png", row.content) for i, row in enumerate(digit_rows())]


def _refused(source: str | Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        opened(f"lmdb:{source}")


def test_keys_that_are_paths_are_read_as_a_folder_is(tmp_path: Path) -> None:
    images = opened(f"lmdb:{_database(tmp_path / 'digits', _as_paths())}")
    assert images.classes == ("digit 0", "digit 1", "digit 2")
    for split, name in ((images.train, "train"), (images.val, "val"), (images.test, "test")):
        assert looks(split) == expected(name)
    assert images.train.ids[0] == "train/digit 0/000.png"
    one = _database(tmp_path / "one.lmdb", _as_paths(), subdir=False)
    assert opened(f"lmdb:{one}").fingerprint == images.fingerprint


def test_a_database_a_split_with_classes_under_keys_of_their_own(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        _database(tmp_path / f"{part}_lmdb", _numbered(_of(part)))
    images = opened(f"lmdb:{tmp_path}")
    assert images.classes == ("0", "1", "2")
    for split, name in ((images.train, "train"), (images.val, "val"), (images.test, "test")):
        assert looks(split) == expected(name)
    assert images.train.ids[0] == "train_lmdb/image-000000001"


def test_of_several_databases_the_splits_of_the_keys_hold_and_another_in_the_name_is_refused(tmp_path: Path) -> None:
    pairs = _as_paths()
    for half, name in enumerate(("a_lmdb", "b_lmdb")):
        _database(tmp_path / "neutral" / name, pairs[half::2])
        _database(tmp_path / "named" / f"{('train', 'test')[half]}_lmdb", pairs[half::2])
    images = opened(f"lmdb:{tmp_path / 'neutral'}")
    assert all("_lmdb/train/" in name for name in images.train.ids)
    for split, name in ((images.train, "train"), (images.val, "val"), (images.test, "test")):
        assert split is not None
        assert len(split) == len(_of(name))
    _refused(tmp_path / "named", r"is called (train|test), and its keys begin with test, train, val; give it a name without a split")
    for part in ("train", "test"):
        bare = [(key.partition("/")[2], value) for key, value in pairs if key.startswith(f"{part}/")]
        _database(tmp_path / "bare" / f"{part}_lmdb", bare)
    bare_images = opened(f"lmdb:{tmp_path / 'bare'}", val_fraction=0)
    assert bare_images.test is not None
    assert (len(bare_images.train), len(bare_images.test)) == (len(_of("train")), len(_of("test")))


def test_small_and_large_values_and_those_that_were_written_twice_are_read_from_their_places(tmp_path: Path) -> None:
    rows = _of("train")
    grown = [row._replace(content=row.content + bytes(20_000)) if i % 3 == 0 else row for i, row in enumerate(rows)]  # pages of their own
    _database(tmp_path / "x", _numbered([grown[-1]] * len(rows)))
    folder = _database(tmp_path / "x", _numbered(grown))
    images = opened(f"lmdb:{folder}", test_fraction=0, val_fraction=0)
    assert looks(images.train) == expected("train")


def test_a_changed_database_is_another_data_set(tmp_path: Path) -> None:
    folder = _database(tmp_path / "x", _as_paths())
    before = opened(f"lmdb:{folder}").fingerprint
    with lmdb.open(str(folder), map_size=2**24) as database, database.begin(write=True) as transaction:
        transaction.delete(_as_paths()[0][0].encode())
    assert opened(f"lmdb:{folder}").fingerprint != before


def test_what_is_broken_is_refused_in_one_message(tmp_path: Path) -> None:
    pairs = _numbered(_of("train"))
    cut = _database(tmp_path / "cut", pairs) / "data.mdb"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2 // 4096 * 4096])
    _refused(tmp_path / "cut", r"data.mdb is cut: it has [\d,]+ bytes and needs [\d,]+; copy or download it again")
    (tmp_path / "text.mdb").write_bytes(b"no database" * 1000)
    _refused(tmp_path / "text.mdb", r"text.mdb is not a whole database of LMDB: .*; copy or download it again")
    (tmp_path / "empty.mdb").write_bytes(b"")
    _refused(tmp_path / "empty.mdb", r"empty.mdb is not a whole database of LMDB")
    bare = _database(tmp_path / "bare", [pair for pair in pairs if pair[0] != "label-000000003"])
    _refused(bare, r"1 of 24 images have no class; these keys are not there: label-000000003")
    few = _database(tmp_path / "few", [pair for pair in pairs if not pair[0].endswith("-000000003")])
    _refused(few, r"num-samples is 24, and 23 keys begin with image-")
    odd = _database(tmp_path / "odd", [*pairs, ("label-000000003", b"\xff")])
    _refused(odd, r"the class of image-000000003 is b'\\xff'; it is a number or a name")


def test_what_is_no_data_set_of_images_is_refused(tmp_path: Path) -> None:
    pickled = _database(tmp_path / "pickled", [(f"{i:08d}", pickle.dumps((row.content, row.label))) for i, row in enumerate(_of("train"))])
    _refused(pickled, r"such as that of 00000000, are Python's pickles, which are not read: they can run programs; images are found by")
    _refused(_database(tmp_path / "none", []), r"holds no image whose key says so")
    (tmp_path / "folder").mkdir()
    _refused(tmp_path / "folder", r"a folder without data.mdb; give the folder or the file of a database")
    _refused(tmp_path / "nowhere", r"nowhere is not there; give the folder or the file of a database of LMDB")
    _refused("", r"data.source is lmdb:; ")
