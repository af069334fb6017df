"""data.exclude and data.relabel: what they change, in every source, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_files import label_pictures
from PIL import Image

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, open_images

WHOLE: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images of cat and six of dog."""
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(10 * k + i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{'=' if i == 5 else ''}{i}.png")
    return tmp_path / "photos"


def _open(source: Path | str, **tables: Any) -> DataSplits:
    """tables: the text of data.exclude and data.relabel, in files beside the folder."""
    place = Path(source).parent if isinstance(source, Path) else tables.pop("place")
    files: dict[str, Any] = {}
    for key, text in tables.items():
        files[key] = str(place / f"{key}.csv")
        Path(files[key]).write_text(text, encoding="utf-8")
    return open_images(Data(source=f"folder:{source}" if isinstance(source, Path) else source, **WHOLE, **files))


def _labels(images: DataSplits) -> dict[str, str]:
    return {name: images.classes[label] for name, label in zip(images.train.ids, images.train.labels.tolist(), strict=True)}


def test_images_are_left_out_and_get_their_right_class(folder: Path) -> None:
    before = _open(folder)
    after = _open(folder, exclude=f"path\ncat/0.png\n{folder / 'dog' / '3.png'}\n", relabel="path,label\ncat/1.png,dog\n./dog/2.png,cat\n")
    expected = _labels(before) | {"cat/1.png": "dog", "dog/2.png": "cat"}
    del expected["cat/0.png"], expected["dog/3.png"]
    assert _labels(after) == expected
    assert after.fingerprint != before.fingerprint
    assert "data.exclude leaves out 2 of 12 images" in after.notes
    assert "data.relabel gives another class to 2 of 12 images" in after.notes
    for position, name in enumerate(after.train.ids):  # each name still has its own pixels
        assert np.array_equal(np.asarray(after.train.read(position)), np.asarray(Image.open(folder / name)))


def test_the_table_of_the_doctor_is_taken_as_it_is(folder: Path) -> None:
    """Also after the user wrote look, or nothing, in the place of a suggestion."""
    table = (
        "path,problem,suggestion,score,other\n"
        "cat/0.png,near-duplicate,exclude,0.99,cat/1.png\n"
        "cat/1.png,blurred,look,0.2,\n"
        "dog/1.png,wrong label,relabel:cat,0.98,\n"
        "dog/=5.png,blank,,0.2,\n"
    )
    after = _labels(_open(folder, exclude=table, relabel=table))
    assert "cat/0.png" not in after
    assert after["dog/1.png"] == "cat"
    assert len(after) == 11


def test_a_formula_of_the_doctors_table_is_a_name_again(tmp_path: Path) -> None:
    rows = "".join(f"=x{i}/{i}.png,c{i % 2}\n" for i in range(4))
    for i in range(4):
        (tmp_path / f"=x{i}").mkdir()
        Image.new("RGB", (8, 8), (i, 99, 3)).save(tmp_path / f"=x{i}" / f"{i}.png")
    (tmp_path / "all.csv").write_text("path,label\n" + rows)
    after = _open(f"csv:{tmp_path / 'all.csv'}", place=tmp_path, exclude="path,suggestion\n'=x0/0.png,exclude\n")
    assert set(_labels(after)) == {"=x1/1.png", "=x2/2.png", "=x3/3.png"}


def test_sources_without_files_are_corrected_too(tmp_path: Path) -> None:
    before = open_images(Data(source="digits", **WHOLE))
    after = _open("digits", place=tmp_path, exclude="path\ndigits/3\n", relabel="path,label\ndigits/0,7\n")
    assert _labels(after) == {name: label for name, label in _labels(before).items() if name != "digits/3"} | {"digits/0": "7"}
    assert np.array_equal(np.asarray(after.train.read(3)), np.asarray(before.train.read(4)))
    assert after.fingerprint not in (before.fingerprint, _open("digits", place=tmp_path, exclude="path\ndigits/4\n").fingerprint)


def test_unreadable_files_can_be_left_out(folder: Path) -> None:
    for i in range(3):
        (folder / "cat" / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="3 of 12 images cannot be read"):
        _open(folder)
    after = _open(folder, exclude="path\n" + "".join(f"cat/{i}.png\n" for i in range(3)))
    assert len(after.train) == 9
    assert not any("cannot be read" in note for note in after.notes)


def test_a_class_that_is_left_out_whole_is_no_class(tmp_path: Path, folder: Path) -> None:
    (folder / "bird").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "bird" / "0.png")
    after = _open(folder, exclude="path\nbird/0.png\n")
    assert after.classes == ("cat", "dog")
    assert "data.exclude and data.relabel leave no image of class bird" in after.notes


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"exclude": "path\ncat/99.png\n"}, r"line 2: folder:.* has no image cat/99.png"),
        ({"exclude": "path\ncat/0.pgn\n"}, r"line 2: .*did you mean cat/0.png\?"),
        ({"exclude": "path\ncat/0.png\ndog/0.png\ncat//0.png\n"}, r"line 4: cat//0.png stands in .*exclude.csv, line 2 already"),
        ({"relabel": "path,label\ncat/0.png,doog\n"}, r"line 2: no image is of class 'doog'; did you mean dog\?"),
        ({"relabel": "path,label\ncat/0.png,9\n"}, r"line 2: no image is of class '9'; there are cat, dog"),
        ({"relabel": "path,label\ncat/0.png,\n"}, r"line 2: cat/0.png gets no class"),
        ({"relabel": "path,suggestion\ncat/0.png,relabel\n"}, r"line 2: cat/0.png gets no class; write relabel:CLASS"),
        ({"relabel": "path\ncat/0.png\n"}, r"has the columns path and not label; the first line names: path,label"),
        ({"exclude": "path,suggestion\ncat/0.png,exlude\n"}, r"line 2: suggestion is 'exlude'; it can be exclude, relabel:CLASS, or look"),
        ({"exclude": "file\ncat/0.png\n"}, r"has the columns file and not path; the first line names: path"),
        ({"exclude": "path\ncat/0.png", "relabel": "path,label\ncat/0.png,dog"}, r"line 2: cat/0.png stands in .*exclude.csv, line 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(tables: dict[str, str], words: str, folder: Path) -> None:
    with pytest.raises(UserError, match=words):
        _open(folder, **tables)


def test_a_table_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.exclude is none.csv, which cannot be read"):
        open_images(Data(source=f"folder:{folder}", exclude="none.csv"))


@pytest.mark.parametrize("written", [{"label_separator": "|"}, {"label_columns": ("Row", "Column", "Square")}], ids=["sets", "columns"])
def test_images_of_several_labels_get_their_right_set(tmp_path: Path, written: dict[str, Any]) -> None:
    label_pictures(tmp_path, 12)
    source = f"csv:{tmp_path}/{'sets' if 'label_separator' in written else 'columns'}.csv"
    before = open_images(Data(source=source, **written, **WHOLE))
    names = {name.lower(): name for name in before.classes}
    both = f"{names['square']}|{names['row']}"

    def opened(table: str) -> DataSplits:
        (tmp_path / "relabel.csv").write_text(table, encoding="utf-8")
        return open_images(Data(source=source, relabel=str(tmp_path / "relabel.csv"), **written, **WHOLE))

    after = opened(f"path,label\n0.png,{both}\n1.png,\n")
    has = dict(zip(after.train.ids, after.train.labels.tolist(), strict=True))
    assert {after.classes[k].lower() for k in np.flatnonzero(has["0.png"])} == {"row", "square"}
    assert has["1.png"] == [0, 0, 0], "none of the labels"
    kept = dict(zip(before.train.ids, before.train.labels.tolist(), strict=True))
    assert all(has[name] == labels for name, labels in kept.items() if name not in ("0.png", "1.png"))
    assert "data.relabel gives other labels to 2 of 12 images" in after.notes
    doctors = opened(f"path,problem,suggestion,score,other\n0.png,wrong label,relabel:{both},0.9,\n2.png,blurred,look,0.2,\n")
    assert doctors.train.labels.tolist()[0] == has["0.png"]
    with pytest.raises(UserError, match=r"relabel.csv, line 2: no image is of class 'rwo'|no image is of class 'Rwo'"):
        opened(f"path,label\n0.png,{names['row'].replace('ow', 'wo')}\n")
    with pytest.raises(
        UserError, match=r"no image is of class 'none of them'; there are .* is written with '\|' between its labels, and empty for"
    ):
        opened("path,suggestion\n0.png,relabel:none of them\n")
    assert opened("path,suggestion\n0.png,relabel:\n").train.labels.tolist()[0] == [0, 0, 0]
    with pytest.raises(UserError, match=r"line 2: 0.png gets no class; write relabel:CLASS"):
        opened("path,suggestion\n0.png,relabel\n")
    with pytest.raises(UserError, match="names a class twice"):
        opened(f"path,label\n0.png,{names['row']}|{names['row']}\n")
