"""hf:NAME and hf:PATH: what the library datasets saves and builds, read by its places; without the library, the Arrow files alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from container_files import digit_rows, expected, looks, opened

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data.containers import hugging_face

pa = pytest.importorskip("pyarrow")

NAMES = ["zero", "one", "two"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _structs(split: str) -> tuple[list[dict[str, Any]], list[int]]:
    rows = [row for row in digit_rows() if row.split == split]
    return [{"bytes": row.content, "path": None} for row in rows], [row.label for row in rows]


def _arrow(file: Path, batches: int = 2, **options: Any) -> Path:
    images, labels = _structs("train")
    table = pa.table({"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), "label": labels})
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=-(-len(table) // batches))
    return file


@pytest.mark.parametrize("batches", [1, 5])
def test_the_place_of_an_image_in_an_arrow_file_holds_its_bytes(tmp_path: Path, batches: int) -> None:
    file = _arrow(tmp_path / "a.arrow", batches)
    contents = hugging_face._look_through(file, Data(source="hf:a"))
    whole = file.read_bytes()
    images, labels = _structs("train")
    assert [whole[e.start : e.start + e.length] for e in contents.images] == [image["bytes"] for image in images]
    assert [e.label for e in contents.images] == list(map(str, labels))
    assert contents.rows == len(images)


def test_arrow_files_that_are_compressed_or_cut_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.arrow holds its images compressed"):
        hugging_face._look_through(_arrow(tmp_path / "a.arrow", compression="zstd"), Data(source="hf:a"))
    file = _arrow(tmp_path / "b.arrow")
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"b.arrow is not a whole Arrow file: .*; copy or download the data set again"):
        hugging_face._look_through(file, Data(source="hf:a"))


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:beans, which needs the library datasets .*: pip install 'tltrain\[hf-datasets\]'"):
        opened("hf:beans")


def _data_set(split: str) -> Any:
    datasets = pytest.importorskip("datasets")
    images, labels = _structs(split)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_a_saved_data_set_has_its_own_splits_and_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": _data_set("train"), "validation": _data_set("val"), "test": _data_set("test"), "unlabeled": _data_set("test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d", num_shards={name: 1 + (name == "train") for name in parts})
    images = opened(f"hf:{tmp_path / 'd'}")
    assert images.classes == tuple(NAMES)
    for split, name in ((images.train, "train"), (images.val, "val"), (images.test, "test")):
        assert looks(split) == expected(name)
    assert list(images.train.ids) == [f"train/{i}" for i in range(len(images.train))], "counted over both files"
    assert "splits that are not used: unlabeled" in images.notes
    assert opened(f"hf:{tmp_path / 'd'}").fingerprint == images.fingerprint


def test_rows_that_were_chosen_before_saving_are_those_that_are_read(tmp_path: Path) -> None:
    data = _data_set("train").shuffle(seed=3).select(range(20))
    data.save_to_disk(tmp_path / "d")
    images = opened(f"hf:{tmp_path / 'd'}", test_fraction=0, val_fraction=0)
    pixels = [np.asarray(row["image"].convert("RGB")).tobytes() for row in data]
    assert [np.asarray(images.train.read(i)).tobytes() for i in range(20)] == pixels
    assert images.train.labels.tolist() == data["label"]


def test_images_in_files_of_their_own_are_read_from_there(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [row for row in digit_rows() if row.split == "train"]
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.png").write_bytes(row.content)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    paths, labels = [str(tmp_path / f"{i}.png") for i in range(len(rows))], [row.label for row in rows]
    datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features).save_to_disk(tmp_path / "d")
    images = opened(f"hf:{tmp_path / 'd'}", test_fraction=0, val_fraction=0)
    assert looks(images.train) == expected("train")


def test_what_cannot_be_had_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(hugging_face, "unresolved", lambda url: "huggingface.co has no address here: is there a network?")
    with pytest.raises(UserError, match=r"hf:nobody/nothing, which cannot be opened: .*; huggingface.co has no address here.*as hf:PATH"):
        opened("hf:nobody/nothing")
    assert not datasets.config.HF_HUB_OFFLINE, "as it was"
    datasets.DatasetDict({"test": _data_set("test"), "other": _data_set("val")}).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=r"its splits are test, other, and none is train"):
        opened(f"hf:{tmp_path / 'd'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"hf:.*empty, which cannot be opened: .*give a folder that `save_to_disk` wrote"):
        opened(f"hf:{tmp_path / 'empty'}")
    with pytest.raises(UserError, match=r"nowhere is not there; give the folder that `save_to_disk` wrote$"):
        opened(f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"give a name on the hub"):
        opened("hf:")
