"""What would give other pixels or labels without a word: files that change under a reader, and files that tables name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from container_files import digit_rows, opened, tar_file
from PIL import Image

from tltrain.core.errors import UserError
from tltrain.data.containers.packed import numbers_first
from tltrain.data.containers.several import files_of

FREE = {"test_fraction": 0, "val_fraction": 0}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _refused(source: str, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match):
        opened(source, **options)


def _table(file: Path, **columns: Any) -> str:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = digit_rows()
    pq.write_table(pa.table({"image": [row.content for row in rows], "label": [row.label for row in rows]} | columns), file)
    return f"parquet:{file}"


def test_a_reader_of_a_table_that_is_replaced_keeps_its_images(tmp_path: Path) -> None:
    source = _table(tmp_path / "a.parquet")
    before = opened(source, **FREE)
    pixels = [np.asarray(before.train.read(i)) for i in range(len(before.train))]
    packs = tmp_path / "cache" / "packs"
    (pack,) = packs.iterdir()
    left = packs / f".{pack.name}.0123456789abcdef.tmp"  # as a process that is killed leaves it
    left.touch()
    rows = digit_rows()[::-1]
    _table(tmp_path / "a.parquet", image=[row.content for row in rows], label=[row.label for row in rows], more=["x"] * len(rows))
    after = opened(source, **FREE)
    assert [after.classes[k] for k in after.train.labels] == [str(row.label) for row in rows]
    for i, seen in enumerate(pixels):
        assert np.array_equal(np.asarray(before.train.read(i)), seen)
        assert np.array_equal(np.asarray(after.train.read(i)), np.asarray(Image.open(io.BytesIO(rows[i].content)).convert("RGB")))
    assert not left.exists()
    pack.write_bytes(pack.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"\.bin has changed since it was looked through"):
        before.train.read(0)


def test_files_that_a_table_names_are_read_where_they_lie(tmp_path: Path) -> None:
    rows = digit_rows()
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.png").write_bytes(row.content)
    pa = pytest.importorskip("pyarrow")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    apart = [{"bytes": None, "path": f"{i}.png"} for i in range(len(rows))]
    source = _table(tmp_path / "a.parquet", image=pa.array(apart, kind))
    first = opened(source, **FREE)
    Image.new("RGB", (8, 8), (9, 200, 9)).save(tmp_path / "0.png")
    again = opened(source, **FREE)
    assert again.fingerprint != first.fingerprint
    assert np.asarray(again.train.read(0))[0, 0].tolist() == [9, 200, 9]
    mixed = [{"bytes": row.content if i else None, "path": f"{i}.png"} for i, row in enumerate(rows)]
    _refused(_table(tmp_path / "b.parquet", image=mixed), "1 of its 45 images lie in files of their own")


def test_a_group_stays_in_one_declared_split_of_a_table(tmp_path: Path) -> None:
    columns = {"split": [row.split for row in digit_rows()], "group": ["one", *[""] * 43, "one"]}
    _refused(
        _table(tmp_path / "a.parquet", **columns), r"group one is in test \(a.parquet/44\) and in train \(a.parquet/0\); a group stays"
    )


def test_odd_class_files_of_a_shard(tmp_path: Path) -> None:
    content = digit_rows()[0].content

    def shard(name: str, *labels: tuple[str, bytes]) -> str:
        members = [pair for i, (suffix, said) in enumerate(labels) for pair in ((f"{i}.png", content), (f"{i}.{suffix}", said))]
        return f"webdataset:{tar_file(tmp_path / name, members)}"

    _refused(shard("a.tar", ("json", rb'{"label": "\ud800"}')), r"0.json names a class that is no text: '\\ud800'")
    _refused(shard("b.tar", ("json", b"[" * 200_000)), r"0.json cannot be read as JSON")
    images = opened(shard("c.tar", ("cls", "\ufeffcat".encode()), ("cls", b"cat"), ("cls", b"9" * 5000)), **FREE)
    assert images.classes == ("9" * 5000, "cat")
    assert numbers_first(["10", "9" * 5000, "9", "010", "0"]) == ("0", "9", "010", "10", "9" * 5000)


@pytest.mark.parametrize("pattern", ["a-*.tar", "a-{0..1}.tar", "."])
def test_a_shard_that_is_a_link_to_nothing_is_refused_and_not_left_out(pattern: str, tmp_path: Path) -> None:
    """As in a cache of downloads whose files were deleted."""
    (tmp_path / "a-0.tar").touch()
    (tmp_path / "a-1.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"; links to nothing in place of files: .*a-1.tar; fetch the files again, or delete the links$"):
        files_of(str(tmp_path / pattern), "webdataset", (".tar",))


def test_a_folder_that_is_called_as_a_file_is_looked_into_or_refused(tmp_path: Path) -> None:
    """As Spark writes a table."""
    parts = [tmp_path / name / "part-0.parquet" for name in ("test.parquet", "train.parquet")]
    for part in parts:
        part.parent.mkdir()
        part.touch()
    for pattern in (".", "**", "*.parquet/*"):
        assert files_of(str(tmp_path / pattern), "parquet", (".parquet",)) == parts
    (tmp_path / "more.parquet").touch()
    with pytest.raises(UserError, match=r"; folders in place of files: .*test.parquet, .*train.parquet; give one folder, or a pattern"):
        files_of(f"{tmp_path}/*.parquet", "parquet", (".parquet",))


def test_a_range_may_hold_stars(tmp_path: Path) -> None:
    for name in ("a-0-x.tar", "a-1-y.tar", "a-1-z.tar"):
        (tmp_path / name).touch()
    assert len(files_of(f"{tmp_path}/a-{{0..1}}-*.tar", "webdataset", (".tar",))) == 3
    with pytest.raises(UserError, match=r"1 of its 3 files cannot be found: .*a-2-\*.tar"):
        files_of(f"{tmp_path}/a-{{0..2}}-*.tar", "webdataset", (".tar",))
