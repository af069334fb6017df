"""What holds of every source: damage, a missing column and a class that train does not have are refused in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from container_files import digit_rows, expected, looks
from source_sets import KINDS, LABELLED_APART, made_source

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import open_images


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _refused(source: str, root: Path) -> str:
    """The message, which is one line."""
    with pytest.raises(UserError) as caught:
        open_images(Data(source=source, max_unreadable=0), root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_set_is_read_with_its_splits(kind: str, tmp_path: Path) -> None:
    images = open_images(Data(source=made_source(kind, tmp_path / "set")), tmp_path / "set")
    assert len(images.classes) == 3
    if kind != "csv":  # whose classes are names, in another order
        assert [looks(split) for split in (images.train, images.val, images.test)] == [expected(n) for n in ("train", "val", "test")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_is_named_in_one_message(kind: str, tmp_path: Path) -> None:
    """The largest one of the set: a shard, a table, a database, or an image."""
    source = made_source(kind, tmp_path / "set")
    files = [path for path in (tmp_path / "set").rglob("*") if path.is_file() and path.suffix != ".csv"]
    cut = max(files, key=lambda path: path.stat().st_size)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2 // 4096 * 4096 or 200])
    assert cut.name in _refused(source, tmp_path / "set")


@pytest.mark.parametrize("kind", LABELLED_APART)
def test_a_set_without_its_classes_is_told_what_is_missing(kind: str, tmp_path: Path) -> None:
    said = _refused(made_source(kind, tmp_path / "set", labelled=False), tmp_path / "set")
    missing = {"csv": "not label", "webdataset": "have no class", "lmdb": "label-"}
    assert missing.get(kind, "data.label_column") in said, said


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_of_test_that_train_does_not_have_is_named(kind: str, tmp_path: Path) -> None:
    rows = [row for row in digit_rows() if row.label < 2 or row.split == "test"]
    said = _refused(made_source(kind, tmp_path / "set", rows), tmp_path / "set")
    names = {"csv": "class two", "hf": "class two", "torchvision": "class kind 2", **dict.fromkeys(("folder", "zip", "tar"), "digit 2 has")}
    assert names.get(kind, "class 2") in said, said
    assert "train" in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_without_the_first_class_keeps_the_labels_of_the_others(kind: str, tmp_path: Path) -> None:
    """torchvision numbers the classes of each split by themselves."""
    rows = [row for row in digit_rows() if row.label > 0 or row.split != "test"]
    images = open_images(Data(source=made_source(kind, tmp_path / "set", rows)), tmp_path / "set")
    assert images.test is not None
    named = sorted(images.classes[label].rpartition(" ")[2] for label in images.test.labels)
    assert named == sorted(["two", "one"] * 4 if kind in ("csv", "hf") else ["1", "2"] * 4)
