"""parquet:GLOB: tables that pyarrow writes, in the forms in which people keep images, and what is refused of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from container_files import digit_rows, expected, looks, opened

from tltrain.core.errors import UserError
from tltrain.data.containers import packed, parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ("zero", "one", "two")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _columns(split: str) -> tuple[list[bytes], list[int]]:
    rows = [row for row in digit_rows() if row.split == split]
    return [row.content for row in rows], [row.label for row in rows]


def _bytes(split: str) -> Any:
    images, labels = _columns(split)
    return pa.table({"Image": images, "Label": labels})


def _texts(split: str) -> Any:
    images, labels = _columns(split)
    return pa.table({"img": pa.array(images, pa.large_binary()), "class": pa.array([NAMES[k] for k in labels]).dictionary_encode()})


def _hugging_face(split: str, names: tuple[str, ...] = NAMES) -> Any:
    """As `datasets` writes it: structs, and what the columns are in the metadata."""
    images, labels = _columns(split)
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}, "mask": {"_type": "Image"}}
    structs = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(structs, kind), "label": labels, "extra_label": labels})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _write(root: Path, table: Callable[[str], Any], splits: tuple[str, ...] = ("train", "val", "test")) -> str:
    root.mkdir(exist_ok=True)
    for split in splits:
        name = {"val": "validation"}.get(split, split)
        pq.write_table(table(split), root / f"{name}-00000-of-00001.parquet", row_group_size=7)
    return f"parquet:{root}/*.parquet"


def _one(file: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), file)
    return f"parquet:{file}"


def _refused(source: str, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match):
        opened(source, **options)


@pytest.mark.parametrize("table", [_bytes, _texts, _hugging_face])
def test_tables_are_read_with_their_own_splits(tmp_path: Path, table: Callable[[str], Any]) -> None:
    images = opened(_write(tmp_path / "d", table))
    names = ("0", "1", "2") if table is _bytes else NAMES
    assert sorted(images.classes) == sorted(names)
    if table is _hugging_face:
        assert images.classes == NAMES, "in the order of the table, which is that of the numbers"
    assert "splits by the names of the files: 1 train, 1 val, 1 test" in images.notes
    for split, name in ((images.train, "train"), (images.val, "val"), (images.test, "test")):
        numbers = {images.classes.index(label): k for k, label in enumerate(names)}
        assert sorted((numbers[k], pixels) for k, pixels in looks(split)) == expected(name)
    assert images.train.ids[3] == "train-00000-of-00001.parquet/3"


def test_a_table_is_laid_out_and_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _write(tmp_path / "d", _hugging_face)
    first = opened(source)
    assert any(note.startswith(f"the images are laid out once in {tmp_path / 'cache' / 'packs'}, 0.1 MB") for note in first.notes)

    def not_again(*_: object) -> None:
        raise AssertionError("what was kept is read")

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_look_through", not_again)
        patch.setattr(packed, "examined", not_again)
        again = opened(source)
    assert again.fingerprint == first.fingerprint
    for pack in (tmp_path / "cache" / "packs").glob("*.bin"):
        pack.unlink()  # as one who makes room
    assert looks(opened(source).train) == expected("train")


def test_splits_and_groups_may_be_columns(tmp_path: Path) -> None:
    rows = digit_rows()
    spelt = {"train": "Training", "val": "dev", "test": "test"}
    columns = {
        "image": [row.content for row in rows],
        "label": [row.label for row in rows],
        "Split": [spelt[row.split] for row in rows],
        "group": [f"{row.split} {i // 2}" for i, row in enumerate(rows)],
    }
    images = opened(_one(tmp_path / "all.parquet", columns))
    assert images.source is not None
    assert len(set(images.source.groups.tolist())) < len(rows)
    assert (looks(images.train), looks(images.test)) == (expected("train"), expected("test"))


def test_columns_are_named_where_several_may_be_meant(tmp_path: Path) -> None:
    images, labels = _columns("train")
    source = _one(tmp_path / "a.parquet", {"left": images, "right": images[::-1], "fine": labels, "coarse": labels})
    free = {"test_fraction": 0, "val_fraction": 0}
    _refused(source, r"any of left, right may be meant; name it with data.image_column, such as --data.image_column left")
    _refused(source, r"columns left, right, fine, coarse, none of which is called like a class; name it with data.label_column",
             image_column="LEFT")  # fmt: skip
    _refused(source, r"data.label_column is 'fin', and .* has no such column; did you mean fine\?", image_column="left", label_column="fin")
    _refused(source, r"column fine holds int64; images are bytes", image_column="fine", label_column="coarse")
    assert looks(opened(source, image_column="Left", label_column="FINE", **free).train) == expected("train")
    _refused("digits", r"data.image_column and data.label_column are of tables of Parquet and Hugging Face", label_column="fine")


def test_what_is_broken_is_refused_in_one_message(tmp_path: Path) -> None:
    images, labels = _columns("train")
    cut = tmp_path / "cut.parquet"
    _one(cut, {"image": images, "label": labels})
    cut.write_bytes(cut.read_bytes()[:-200])
    _refused(f"parquet:{cut}", r"cut.parquet is not a whole Parquet file: ")
    _refused(_one(tmp_path / "a.parquet", {"label": labels}), r"has the columns label, none of which holds images")
    _refused(_one(tmp_path / "b.parquet", {"image": images, "label": [None, *labels[1:]]}), r"b.parquet, row 0: label is empty")
    _refused(
        _one(tmp_path / "c.parquet", {"image": images, "label": [[k] for k in labels]}), r"column label holds list<.*one number or one"
    )
    _refused(_one(tmp_path / "d.parquet", {"image": images, "label": [k / 2 for k in labels]}), r"column label holds double")
    _refused(_one(tmp_path / "e.parquet", {"image": images, "label": labels, "split": ["holdout"] * 24}), r"row 0: split is 'holdout'")
    _refused(f"parquet:{tmp_path}/none.parquet", r"and no file is there")
    few = tmp_path / "few"
    _refused(_write(few, lambda split: _hugging_face(split, NAMES[:2]), ("train",)), r"row 16: label is 2, and the table names 2 classes")
    pq.write_table(_hugging_face("test", ("zero", "two", "one")), few / "test.parquet")
    pq.write_table(_hugging_face("train"), few / "train-00000-of-00001.parquet")
    _refused(f"parquet:{few}", r"the tables name different classes: \(zero, one, two\) and \(zero, two, one\)")


def test_classes_that_are_nowhere_and_rows_without_one_are_said(tmp_path: Path) -> None:
    source = _write(tmp_path / "d", lambda split: _hugging_face(split, (*NAMES, "three")), ("train",))
    hidden = _hugging_face("test").set_column(1, "label", pa.array([-1, *_columns("test")[1][1:]]))
    pq.write_table(hidden, tmp_path / "d" / "test-00000-of-00001.parquet")
    _refused(source, r"the tables name different classes")
    pq.write_table(_hugging_face("train"), tmp_path / "d" / "train-00000-of-00001.parquet")
    images = opened(source, val_fraction=0)
    assert images.test is not None
    assert len(images.test) == len(_columns("test")[0]) - 1
    assert "test-00000-of-00001.parquet: 1 images whose class is -1, not told, are left out" in images.notes
    alone = opened(_write(tmp_path / "e", lambda split: _hugging_face(split, (*NAMES, "three")), ("train",)))
    assert alone.classes == NAMES
    assert "classes that no image has are left out: three" in alone.notes


def test_an_image_that_is_nothing_is_left_out_with_its_row(tmp_path: Path) -> None:
    images, labels = _columns("train")
    source = _one(tmp_path / "a.parquet", {"image": [None, *images[1:]], "label": labels})
    _refused(source, r"a.parquet/0 \(the file is empty\)", max_unreadable=0)
    assert any("a.parquet/0 (the file is empty)" in note for note in opened(source).notes)


def test_without_pyarrow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    _refused(f"parquet:{tmp_path}/*.parquet", r"pyarrow, which is not here .*: pip install 'tltrain\[parquet\]'")
