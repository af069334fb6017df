"""`tltrain doctor` of a table whose images have several labels."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from label_files import CLASSES, label_pictures

from tltrain.analysis.doctor import labels
from tltrain.cli.main import main
from tltrain.core.recipe import Data
from tltrain.data import open_images


def _clusters(num: int) -> tuple[torch.Tensor, np.ndarray]:
    """Features (N, 24) in which three labels can be read, the last of them rare, and the labels (N, 3)."""
    random = np.random.default_rng(0)
    label_NK = (random.random((num, 3)) < (0.5, 0.3, 0.06)).astype(np.uint8)
    features_ND = label_NK @ random.normal(size=(3, 24)) * 2 + random.normal(size=(num, 24)) * 0.7
    return torch.from_numpy(features_ND).float(), label_NK


def test_sets_with_a_label_too_many_or_too_few_are_named_with_the_set_that_they_look_like() -> None:
    features_ND, label_NK = _clusters(200)
    given_NK = label_NK.copy()
    planted = [3, 50, 120]
    given_NK[3, 0] ^= 1
    given_NK[50, 1] ^= 1
    given_NK[120, :2] ^= 1
    p_NK = labels.unseen_probabilities(features_ND, given_NK, np.arange(200), 3, 0)
    assert ((p_NK >= 0) & (p_NK <= 1)).all()
    found = {f.position: f for f in labels.wrong_sets(p_NK, given_NK, [str(i) for i in range(200)], CLASSES)}
    assert set(planted) <= set(found)
    assert len(found) <= 6
    for i in planted:
        names = {name for name, has in zip(CLASSES, label_NK[i], strict=True) if has}
        assert set(found[i].other.split("|")) == (names or {"none of the labels"})
        assert found[i].suggestion == "look"


def test_a_rare_label_that_no_feature_tells_is_not_doubted() -> None:
    features_ND, label_NK = _clusters(200)
    blind_NK = label_NK.copy()
    blind_NK[:, 2] = np.arange(200) % 20 == 0
    p_NK = labels.unseen_probabilities(features_ND, blind_NK, np.arange(200), 3, 0)
    assert (p_NK[blind_NK[:, 2] > 0, 2] < 0.2).all(), "it is likely to no image, whether it has it or not"
    doubted = {f.position for f in labels.wrong_sets(p_NK, blind_NK, [str(i) for i in range(200)], CLASSES)}
    assert not doubted & set(range(0, 200, 20))


def test_an_image_is_near_to_those_that_share_one_of_its_labels() -> None:
    features_ND, label_NK = _clusters(120)
    features_ND[7] = -10 * features_ND[7]
    strange_N = labels.strangeness(features_ND, label_NK, np.arange(120))
    assert strange_N.argmax() == 7
    assert np.isfinite(strange_N).all()


def test_copies_with_other_labels_are_found_and_the_table_is_taken_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    label_pictures(tmp_path, 40)
    for i, (copy, label) in enumerate((("a", ""), ("b", "row|square"))):  # of one image of the set, one has other labels
        shutil.copyfile(tmp_path / "1.png", tmp_path / f"{copy}.png")
        with (tmp_path / "sets.csv").open("a") as file:
            own = next(line for line in (tmp_path / "sets.csv").read_text().splitlines() if line.startswith("1.png")).partition(",")[2]
            file.write(f"{copy}.png,{own if i == 0 else label}\n")
    words = ["doctor", f"{tmp_path}/sets.csv", "--label-separator", "|", "--backbone", "resnet-tiny", "--csv", str(tmp_path / "doctor.csv")]
    assert main([*words, "--out", str(tmp_path / "doctor.html"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    problems = {(f["path"], f["problem"]) for f in found}
    assert {path for path, problem in problems if problem == "duplicate across classes"} & {"b.png", "1.png", "a.png"}
    assert {path for path, problem in problems if problem in ("identical", "duplicate across splits")} & {"1.png", "a.png"}
    page = (tmp_path / "doctor.html").read_text()
    assert "3 labels; by pixels and" in page
    with (tmp_path / "doctor.csv").open() as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    table = "path,suggestion\n" + "".join(f"{name},{row['suggestion']}\n" for name, row in rows.items()) + "0.png,relabel:square\n"
    (tmp_path / "edited.csv").write_text(table)
    spec = Data(
        source=f"csv:{tmp_path}/sets.csv", label_separator="|", relabel=str(tmp_path / "edited.csv"), exclude=str(tmp_path / "edited.csv"),
        val_fraction=0, test_fraction=0,
    )  # fmt: skip
    images = open_images(spec)
    assert images.train.labels[list(images.train.ids).index("0.png")].tolist() == [0, 0, 1]
