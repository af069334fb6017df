"""`tltrain folds` of several labels an image: every image is named once, by a network and thresholds that never saw it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import made_recipe
from label_files import label_pictures
from sklearn.metrics import average_precision_score, f1_score

from tltrain.cli.main import main
from tltrain.runs.folds import labels
from tltrain.runs.folds.compared import compared_folds
from tltrain.runs.folds.pooled import pool
from tltrain.runs.record import prediction_rows, probability_columns
from tltrain.runs.report.labels import by_label

NAMES = ("column", "row", "square")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folds")
    label_pictures(root, 90)
    data = {
        "source": f"csv:{root}/sets.csv", "label_separator": "|", "size": 16, "resize": 16, "val_fraction": 0.3, "eval_limit": None,
        "per_class": None,
    }  # fmt: skip
    head = {"name": "head", "unfreeze": "head", "solve": "ridge"}
    (root / "r.yaml").write_text(made_recipe(data=data, select="map", stages=[head]).to_yaml(), encoding="utf-8")
    assert main(["folds", str(root / "r.yaml"), "--k", "2", "--workers", "0", "--folder", str(root / "folds")]) == 0
    return root / "folds"


def test_the_figures_together_are_scikit_learns_of_all_images(folder: Path) -> None:
    pooled = pool(folder)
    assert pooled is not None
    test, columns = pooled.record.test, [f"p:{name}" for name in NAMES]
    assert test is not None
    rows = [row for fold in (0, 1) for row in prediction_rows(folder / f"r0-f{fold}", columns)]
    assert len(rows) == len({row["id"] for row in rows}) == test["n"] == 90
    has, said = (np.array([[name in row[key].split("|") for name in NAMES] for row in rows]) for key in ("label", "predicted"))
    share = np.array([[float(row[column]) for column in columns] for row in rows])
    each = [average_precision_score(has[:, k], share[:, k]) for k in range(3)]
    assert test["map"] == pytest.approx(np.mean(each), abs=1e-4)
    assert [row["ap"] for row in test["per_label"]] == pytest.approx(each, abs=1e-4)
    assert test["f1_macro"] == pytest.approx(f1_score(has, said, average="macro"))
    assert test["subset_accuracy"] == pooled.accuracy.value == pytest.approx((has == said).all(1).mean())
    assert pooled.accuracies.tolist() == [run.test["map"] for _, run in pooled.runs if run.test is not None]
    tests = [run.test for _, run in pooled.runs if run.test is not None]
    assert test["loss"] == pytest.approx(sum(t["n"] * t["loss"] for t in tests) / 90)
    low, high = test["intervals"]["map"]
    assert low <= test["map"] <= high
    assert len({tuple(row["threshold"] for row in t["per_label"]) for t in tests}) == 2  # of each fold's own val


def test_repeats_without_groups_claim_none_and_the_page_says_what_each_fold_fitted(folder: Path) -> None:
    pooled = pool(folder)
    assert pooled is not None
    columns = probability_columns((pooled.record.test or {})["classes"])
    rows = [row for member, _ in pooled.runs for row in prediction_rows(member.path, columns)]
    tests = [run.test for _, run in pooled.runs if run.test is not None] * 2
    twice = labels.figures(labels.pooled(rows * 2, tests, pooled.predictions.ids, None), tests, 90, 0.5)
    assert "groups" not in twice
    page = str(by_label(replace(pooled.record, test=twice)))
    for words in ("the answers of several networks on each", "their median is shown", "fitted on its own val, "):
        assert words in page
    plain = [{**t, "calibration": {"temperature": 1.0}, "per_label": [{**r, "threshold": 0.5} for r in t["per_label"]]} for t in tests[:2]]
    unfitted = labels.figures(labels.pooled(rows, plain, pooled.predictions.ids, None), plain, 90, 0.5)
    assert "no threshold was fitted" in str(by_label(replace(pooled.record, test=unfitted)))
    shown = {name: note for name, _, note in labels.key_figures(unfitted, [run for _, run in pooled.runs])}
    assert "named from 0.5 on" in shown["F1"]
    assert shown["mAP"].startswith(f"{100 * unfitted['intervals']['map'][0]:.1f}\u00a0to")


def test_the_page_the_table_and_a_comparison_name_sets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (folder / "folds.html").read_text(encoding="utf-8")
    for words in ("mAP is", "Label by label", "Exact sets", "square"):
        assert words in page
    assert "Confusion" not in page
    with (folder / "out_of_fold.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 90
    assert {name for row in rows for name in row["label"].split("|")} == {"", *NAMES}
    assert json.loads((folder / "pooled_metrics.json").read_text(encoding="utf-8"))["map_of_runs"]
    assert main(["report", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "all labels right" in shown
    assert "mAP" in shown
    entry = compared_folds("a", folder)
    assert entry.predicted is not None
    assert entry.accuracy is not None
    assert entry.predicted.right.mean() == entry.accuracy.value
    assert {label for _, label in entry.predicted.samples} <= {row["label"] for row in rows}
