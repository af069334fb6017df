"""Tables as programs and people save them: what is read, what is said, and what is refused with its line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, open_images

HALVES = "img/0.png,cat\nimg/1.png,dog\nimg/2.png,cat\nimg/3.png,dog\n"
NO_SPLITS = {"val_fraction": 0, "test_fraction": 0}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """img/0.png to img/5.png beside the table."""
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "img").mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(tmp_path / "img" / f"{i}.png")
    return tmp_path


def _open(folder: Path, table: str | bytes, **options: Any) -> DataSplits:
    (folder / "t.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    return open_images(Data(source=f"csv:{folder / 't.csv'}", **{**NO_SPLITS, **options}))


def _refused(folder: Path, table: str | bytes, match: str) -> str:
    with pytest.raises(UserError, match=match) as caught:
        _open(folder, table)
    str(caught.value).encode()  # it can be printed
    return str(caught.value)


def _pairs(images: DataSplits) -> list[tuple[str, str]]:
    return [(name, images.classes[label]) for name, label in zip(images.train.ids, images.train.labels, strict=True)]


RIGHT = [("img/0.png", "cat"), ("img/1.png", "dog"), ("img/2.png", "cat"), ("img/3.png", "dog")]


@pytest.mark.parametrize(
    "save",
    [
        lambda rows: ("path, label\n" + rows.replace(",", ", ")).encode(),
        lambda rows: ("Path,Label\n" + rows).encode(),
        lambda rows: ("path;label\n" + rows.replace(",", ";")).encode(),
        lambda rows: ("sep=;\npath;label\n" + rows.replace(",", ";")).encode(),
        lambda rows: ("path\tlabel\n" + rows.replace(",", "\t")).encode(),
        lambda rows: ("path,label\n" + rows).encode("utf-16"),
        lambda rows: ("path\tlabel\n" + rows.replace(",", "\t")).encode("utf-16"),
        lambda rows: ("path,label\n" + rows).encode("utf-8-sig"),
        lambda rows: ("path,label\n" + rows).replace("\n", "\r\n").encode(),
        lambda rows: ("path,label\n" + rows).replace("\n", "\r").encode(),
        lambda rows: ("path,label\n" + rows.replace("\n", ",,\n") + ",,,\n\n , \n").encode(),
        lambda rows: ('"path", "label"\n' + rows.replace(",", ', "').replace("\n", '"\n')).encode(),
    ],
    ids=["spaces", "capitals", "semicolons", "sep", "tabs", "utf-16", "utf-16 tabs", "mark", "windows", "old mac", "empty cells", "quotes"],
)
def test_every_way_of_saving_the_same_table_is_the_same_data(folder: Path, save: Callable[[str], bytes]) -> None:
    images = _open(folder, save(HALVES))
    assert _pairs(images) == RIGHT
    assert images.fingerprint == _open(folder, "path,label\n" + HALVES).fingerprint


def test_a_quoted_comma_is_part_of_the_label(folder: Path) -> None:
    images = _open(folder, 'path, label\nimg/0.png, "cat, black"\nimg/1.png,"cat, white"\n')
    assert images.classes == ("cat, black", "cat, white")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "path,label\nimg/0.png,cat\nimg/1.png,cat, black\n",
            r"line 3: 3 values for 2 columns, black too many; put a value .* into quotes",
        ),
        ("path,label,path\nimg/0.png,cat,x\n", "line 1: column path stands there more than once"),
        ("path,label, Label\nimg/0.png,cat,x\n", "line 1: column label stands there more than once"),
        (b"path,label\nimg/0.png,cat\ni\0mg/1.png,dog\n", "line 3: a NUL byte, which no path and no label can have; remove it"),
        ("path,label\nimg/0.png,cat\n".encode("utf-16-le"), r"line 1: a NUL byte.*looks like UTF-16: `iconv -f UTF-16LE"),
        ("path,label\nimg/0.png,cat\nimg/1.png,café\n".encode("cp1252"), r"in UTF-8: line 3: .*save it as UTF-8.*iconv -f WINDOWS-1252"),
        ('path,label\nimg/0.png,"cat" x\n', r"line 2: .*quotes belong around a whole value"),
        ('path,label\nimg/0.png,"cat\n', r"line 2: .*quotes belong around a whole value"),
        ("img/0.png,cat\nimg/1.png,dog\n", "has the columns img/0.png, cat and not path, label; the first line names"),
        ("path,label\nimg/0.png,cat\n,dog\n", "line 3: path is empty"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_line(folder: Path, table: str | bytes, message: str) -> None:
    _refused(folder, table, message)


def test_a_table_of_names_alone_and_a_column_without_a_name_are_said(folder: Path) -> None:
    _refused(folder, "path,label\n", r"t\.csv has no line below the names of its columns; each further line names an image: path,label")
    numbered = "".join(f"{i},{line}\n" for i, line in enumerate(HALVES.splitlines()))  # as pandas saves it
    assert "columns that are not used: one without a name" in _open(folder, f",path,label\n{numbered}").notes


def test_splits_in_any_case_and_by_their_usual_names(folder: Path) -> None:
    rows = "\n".join(
        f"img/{i}.png,{'cd'[i % 2]},{split}" for i, split in enumerate(["Train", "TRAINING", "dev", "Valid", "Testing", "test"])
    )
    images = _open(folder, f"path,label,Split\n{rows}\n")
    assert images.val is not None
    assert images.test is not None
    assert (images.train.ids, images.val.ids, images.test.ids) == tuple((f"img/{i}.png", f"img/{i + 1}.png") for i in (0, 2, 4))


@pytest.mark.parametrize("spelling", ["./img/0.png", "img//0.png", "img/../img/0.png", "{folder}/img/0.png", "~/img/0.png", r"img\0.png"])
def test_one_file_by_two_spellings_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    monkeypatch.setenv("HOME", str(folder))
    table = f"path,label\nimg/0.png,cat\n{spelling.format(folder=folder)},dog\n"
    _refused(folder, table, r"line 3: .*0\.png stands in line 2 already( as img/0\.png)?; list each image once")


def test_paths_that_read_alike_through_a_link_are_two_files(folder: Path) -> None:
    (folder / "far" / "deep").mkdir(parents=True)
    (folder / "far" / "0.png").write_bytes((folder / "img" / "5.png").read_bytes())
    (folder / "img" / "link").symlink_to(folder / "far" / "deep")
    images = _open(folder, "path,label\nimg/0.png,cat\nimg/link/../0.png,dog\n")
    assert images.train.ids == ("img/0.png", "img/link/../0.png")
    assert not np.array_equal(np.asarray(images.train.read(0)), np.asarray(images.train.read(1)))


def test_one_picture_under_two_labels_by_a_link_is_said(folder: Path) -> None:
    (folder / "other").symlink_to("img")
    images = _open(folder, "path,label\nimg/0.png,cat\nother/0.png,dog\nimg/1.png,dog\n")
    assert images.notes[0] == (
        "1 pair of byte-identical images stands under two labels, so that one of them is wrong: img/0.png (cat) = other/0.png (dog)"
    )


def test_paths_of_windows_and_of_the_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / r"odd\name.png").write_bytes((folder / "img" / "4.png").read_bytes())
    (folder / "~nobody-of-this-name.png").write_bytes((folder / "img" / "5.png").read_bytes())
    rows = [r"img\0.png,cat", "~/img/1.png,dog", r"odd\name.png,cat", "~nobody-of-this-name.png,dog"]
    images = _open(folder, "path,label\n" + "\n".join(rows))
    assert images.train.ids == ("img/0.png", "~/img/1.png", r"odd\name.png", "~nobody-of-this-name.png")
    assert r"1 of the paths are written with \ and are read with /" in images.notes


def test_labels_that_may_be_one_and_missing_values_are_said(folder: Path) -> None:
    images = _open(folder, "path,label,group\nimg/0.png,Cat,nan\nimg/1.png,cat,\nimg/2.png,nan,nan\nimg/3.png,01,\nimg/4.png,1,\n")
    assert images.notes[:4] == (
        "2 images of group 'nan', which reads like a missing value: they stay together as one group",
        "classes whose names differ only in how a number is written: '01' (1 image) and '1' (1 image); if they are one, give them one name",
        "classes whose names differ only in upper and lower case: 'Cat' (1 image) and 'cat' (1 image); if they are one, give them one name",
        "classes that are called like a missing value: 'nan' (1 image)",
    )


def test_a_table_or_an_image_that_is_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.csv")
    with pytest.raises(UserError, match="cannot be read as a comma-separated table: a named pipe, not a file"):
        open_images(Data(source=f"csv:{folder / 'pipe.csv'}"))
    os.mkfifo(folder / "img" / "pipe.png")
    table = "path,label\nimg/pipe.png,cat\n/dev/zero,dog\nimg,dog\n" + HALVES
    notes = _open(folder, table, max_unreadable=0.5).notes
    for name, what in (("pipe.png", "a named pipe"), ("/dev/zero", "a device"), ("img", "a folder")):
        assert f"{name} ({what}, not a file)" in notes[0]
