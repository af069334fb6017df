"""`tltrain.fit` from Python: a list of files and their labels, or a folder, becomes a run; mistakes are one clear error."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digit_files import digit_image
from label_files import CLASSES, label_pictures
from sklearn.datasets import load_digits

import tltrain
from tltrain.core.errors import UserError


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[np.int64]]:
    """12 images of each of three digits, all in one folder, as a table of someone's would list them."""
    folder, target = tmp_path_factory.mktemp("listed"), load_digits().target
    numbers = [int(number) for k in range(3) for number in np.flatnonzero(target == k)[:12]]
    for number in numbers:
        digit_image(number).save(folder / f"{number}, no label.png")
    return [folder / f"{number}, no label.png" for number in numbers], [target[number] for number in numbers]


def test_files_and_labels_become_a_run(
    listed: tuple[list[Path], list[np.int64]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, labels = listed
    monkeypatch.chdir(paths[0].parent)
    few: dict[str, Any] = {"minutes": 0.001, "backbones": ["resnet-tiny"], "workers": 0, "folder": tmp_path / "fit"}
    run = tltrain.fit([path.name for path in paths], labels, **few)
    assert run.outcome["outcome"] == "finished"
    assert run.classes == ("0", "1", "2")
    assert run.metrics["n"] > 0
    right = sum(one.label == str(label) for one, label in zip(run.predict(paths), labels, strict=True))
    assert right > 24, "it has learned which label belongs to which file"
    with (tmp_path / "fit.images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["path"], row["label"]) for row in rows] == [(str(path), str(label)) for path, label in zip(paths, labels, strict=True)]
    again = tltrain.fit(paths, [str(label) for label in labels], **few)
    assert "is finished already" in capsys.readouterr().out
    assert again.metrics == run.metrics
    with pytest.raises(UserError, match="lists other images or labels than these; choose another folder"):
        tltrain.fit(paths, labels[::-1], **few)


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (["a.png", "b.png"], None, "labels is missing; give the class of each file"),
        (["a.png", "b.png"], ["x"], "there are 2 images and 1 labels"),
        (["a.png", "b.png"], ["x", "x"], "all 2 labels are 'x'"),
        ([], [], "there are no images"),
        (["a.png", "none.png", "nor.png"], [0, 1, 1], r"2 of 3 images are not there: .*none\.png.*relative paths begin at"),
        (["a.png", "b.png"], [0.5, 1], r"labels\[0\] is 0\.5; a label is a whole number"),
        (["a.png", "b.png"], [True, False], r"labels\[0\] is True"),
        (["a.png", "b.png"], ["x", " x"], r"labels\[1\] is ' x'"),
        (["a.png", "./a.png"], ["x", "y"], r"images\[1\] and images\[0\] are the same file"),
        (["a.png", 5], ["x", "y"], r"images\[1\] is a int; give the paths of files"),
        (["a.png", "b.png"], [["x", "y"], "x"], r"labels\[0\] is \['x', 'y'\] and labels\[1\] is 'x'; .* give a list for each file"),
        (["a.png", "b.png"], [["x", "y", "x"], []], r"labels\[0\] is \['x', 'y', 'x'\], which names a label twice"),
        (["a.png", "b.png"], [["x|y"], ["z"]], r"labels\[0\] is \['x\|y'\], and '\|' parts the labels of a file"),
        (["a.png", "b.png"], [["x", ""], ["z"]], r"labels\[0\] is ''; a label is a whole number"),
        (["a.png", "b.png"], [["x"], []], "all 2 labels are 'x'"),
        (["a.png", "b.png"], [np.array([0, 1]), np.array([1, 0])], r"labels\[0\] is array\(\[0, 1\]\); a label is a whole number"),
        ("photos", ["x", "y"], "images is 'photos', one path, and labels are given"),
        ("photos", None, "the data is 'photos', which is no folder"),
    ],
)
def test_a_mistake_is_said_before_anything_is_written(
    images: Any, labels: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        digit_image(0).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        tltrain.fit(images, labels, folder="fit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_files_with_several_labels_each_become_a_run(tmp_path: Path) -> None:
    has_N3 = label_pictures(tmp_path, 60).tolist()
    paths = [tmp_path / f"{i}.png" for i in range(60)]
    sets = [{name for name, there in zip(CLASSES, has, strict=True) if there} for has in has_N3]
    assert set() in sets
    few: dict[str, Any] = {"minutes": 0.001, "backbones": ["resnet-tiny"], "workers": 0, "folder": tmp_path / "fit"}
    run = tltrain.fit(paths, sets, **few)
    assert run.classes == tuple(sorted(CLASSES))
    said = run.predict(paths)
    right = sum(set(one.labels or ()) == names for one, names in zip(said, sets, strict=True))
    assert right > 30, "it has learned which labels belong to which file: the most frequent set is that of 18"
    assert tltrain.fit(paths, ["|".join(sorted(names)) for names in sets], label_separator="|", **few).metrics == run.metrics
    with pytest.raises(UserError, match=r"label_columns is \['row'\], columns of a table, and images is a list of files"):
        tltrain.fit(paths, sets, label_columns=["row"], **few)
