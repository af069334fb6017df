"""`tltrain fit` of a table whose images have several labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_words import mistake
from label_files import label_pictures

import tltrain
from tltrain.cli.main import main
from tltrain.fitting import choose
from tltrain.fitting.race import against_head
from tltrain.runs import run_dir


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    label_pictures(tmp_path, 120)
    return tmp_path


def _words(root: Path, *more: str) -> list[str]:
    return ["fit", f"{root}/sets.csv", "--backbones", "resnet-tiny", "--folder", str(root / "fit"), "--workers", "0", *more]


def test_a_table_of_sets_becomes_a_recipe_of_labels_and_a_run(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_words(pictures, "--minutes", "0.001", "--label-separator", "|")) == 0
    printed, text = capsys.readouterr().out, (pictures / "fit" / "recipe.yaml").read_text()
    assert "3 labels of " in printed
    recipe, test = run_dir.read_recipe(pictures / "fit" / "run"), run_dir.test_metrics(pictures / "fit" / "run")
    assert (recipe.data.label_separator, recipe.select) == ("|", "map")
    assert recipe.data.val_fraction > 0, "thresholds are fitted on val, however few images a label has"
    assert "# worked out, not trained: mAP" in text
    assert "a random order:" in " ".join(text.replace("#", " ").split())
    assert test is not None
    assert test["map"] > 0.6, "a random order has 0.37"
    before = (pictures / "fit" / "fit.json").read_text()
    assert main(_words(pictures, "--minutes", "0.001", "--label-separator", "|")) == 0
    assert (pictures / "fit" / "fit.json").read_text() == before, "what was measured is kept"
    capsys.readouterr()
    assert "label_separator: | -> None" in mistake(_words(pictures, "--minutes", "0.001"), capsys)
    both = _words(pictures, "--label-separator", "|", "--label-columns", "Row,Column", "--folder", str(pictures / "other"))
    assert "two ways to write several labels" in mistake(both, capsys)


def test_names_with_commas_count_once_and_without_blanks(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fit(wanted: Any, *rest: Any) -> str:
        asked.append(wanted)
        return "finished"

    monkeypatch.setattr("tltrain.fitting.fit.fit", fit)
    words = ["fit", f"{pictures}/columns.csv", "--backbones", "resnet-tiny, resnet-tiny,", "--label-columns", "Row, Column,Row"]
    assert main(words) == 0
    assert (asked[0].backbones, asked[0].label_columns) == (("resnet-tiny",), ("Row", "Column"))


def test_depths_are_told_apart_by_mean_average_precision() -> None:
    random, ids = np.random.default_rng(0), [f"{i}.png" for i in range(200)]
    label_NK = random.integers(0, 2, (200, 3))
    said = {name: label_NK + scale * random.normal(size=(200, 3)) for name, scale in (("head", 1.0), ("deep", 0.3), ("all", 0.29))}
    answers = {name: dict(zip(ids, np.stack([logits, label_NK], 1), strict=True)) for name, logits in said.items()}
    raced = against_head(answers, None)
    assert raced.chosen == "deep", "the shallowest that the best cannot be told from"
    assert raced.sentence.startswith("race on 200 images by mAP, each judged by a network that never saw it: head ")


@pytest.mark.slow
def test_depths_are_raced_on_folds_of_labels(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "LEAST_STEPS", 20)
    monkeypatch.setattr(choose, "EPOCHS", ((10**12, 2.0),))
    run = tltrain.fit(
        pictures / "columns.csv", minutes=20, backbones=["resnet-tiny"], folder=pictures / "fit", workers=0,
        label_columns=["Row", "Column", "Square"],
    )  # fmt: skip
    assert run.metrics["map"] > 0.6
    text = " ".join((pictures / "fit" / "recipe.yaml").read_text().replace("#", " ").split())
    assert "race on 96 images by mAP, each judged by a network that never saw it: head " in text
    assert json.loads((pictures / "fit" / "fit.json").read_text())["plan"]["facts"]["label_columns"] == ["Row", "Column", "Square"]
