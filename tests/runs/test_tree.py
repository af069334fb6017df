"""Classes in a tree: figures by level and node against answers that were counted by hand, and where a run shows them."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import made_recipe
from digit_files import digit_folder
from page_reader import Page

from tltrain.cli.main import main
from tltrain.core.flags import RunFlags
from tltrain.runs.report import tree
from tltrain.runs.report.stats import wilson
from tltrain.training.run import train

CLASSES = ("animals/birds/owl", "animals/birds/tit", "animals/fish", "plants/oak")
TRUE = np.array([0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
SAID = np.array([0, 1, 2, 3, 1, 1, 2, 0, 3, 3])
"""Of the owls one is right, one is taken for a tit, one for a fish, one for an oak; one fish is taken for an owl."""


def _none(among: np.ndarray, hit: np.ndarray) -> dict[str, Any]:
    return {}


def test_levels_and_nodes_are_those_that_were_counted_by_hand() -> None:
    found = tree.figures(CLASSES, TRUE, SAID, _none)
    assert [(row["nodes"], row["top1"], row["begin"]) for row in found["levels"]] == [(2, 0.9, 1), (3, 0.7, 2), (4, 0.6, 1)]
    assert found["same_parent"] == 1, "the tit"
    assert [(node["path"], node["classes"], node["n"], node["right"], node["exact"]) for node in found["nodes"]] == [
        ("animals", 3, 8, 7, 4),
        ("animals/birds", 2, 6, 4, 3),
        ("animals/birds/owl", 1, 4, 1, 1),
        ("animals/birds/tit", 1, 2, 2, 2),
        ("animals/fish", 1, 2, 1, 1),
        ("plants", 1, 2, 2, 2),
        ("plants/oak", 1, 2, 2, 2),
    ]


def test_a_class_that_lies_higher_is_a_mistake_of_its_own_level() -> None:
    found = tree.figures(("plants/moss", "plants/trees/oak"), np.array([0, 1]), np.array([1, 1]), _none)
    assert [row["top1"] for row in found["levels"]] == [1.0, 0.5, 0.5]
    assert found["same_parent"] == 0, "the parent of an oak is trees"


def test_classes_at_the_top_have_no_parent_to_stay_inside() -> None:
    found = tree.figures(("cats", "dogs", "birds/owl", "birds/tit"), np.array([0, 1, 2, 3]), np.array([1, 0, 3, 3]), _none)
    assert found["same_parent"] == 1, "the owl"
    assert tree.inside(found, 4) == "33\u202f%"


def test_intervals_of_groups_are_kept_and_shown() -> None:
    found = tree.figures(CLASSES, TRUE, SAID, lambda among, hit: {"ends": [0.123, 0.987]} if among.any() else {})
    assert all(row["ends"] == [0.123, 0.987] for row in (*found["levels"], *found["nodes"]))
    page = str(tree.compared([("one", {"tree": found, "n": 10}), ("other", {"n": 10})]))
    assert "12.3\u00a0to\u00a098.7" in page
    low, high = wilson(0.9, 10)
    plain = str(tree.compared([("one", {"tree": tree.figures(CLASSES, TRUE, SAID, _none), "n": 10})]))
    assert f"{100 * low:.1f}\u00a0to\u00a0{100 * high:.1f}" in plain
    assert tree.compared([("other", {"n": 10})]) is None


def _run(root: Path) -> Path:
    """A run on digits in a tree."""
    digit_folder(root)
    for split in ("train", "val", "test"):
        for k, parent in enumerate(("low/round", "low", "high", "high")):
            place = root.parent / "digits" / split / parent
            place.mkdir(parents=True, exist_ok=True)
            (root / split / f"digit {k}").rename(place / f"digit {k}")
    data = {"source": f"folder:{root.parent / 'digits'}", "depth": 3, "per_class": None}
    path = root.parent / "run"
    recipe = made_recipe(batch=8, data=data, stages=[{"name": "head", "unfreeze": "head", "steps": 3, "lr": 0.01}])
    train(recipe, RunFlags(folder=path, workers=0))
    return path


def test_a_run_shows_its_tree_and_evaluate_and_compare_give_its_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path / "flat")
    test = json.loads((run / "test_metrics.json").read_text())
    assert test["classes"] == ["high/digit 2", "high/digit 3", "low/digit 1", "low/round/digit 0"]
    with (run / "test_predictions.csv").open(newline="") as file:
        pairs = [(row["label"], row["predicted"]) for row in csv.DictReader(file)]
    levels = test["tree"]["levels"]
    for row in levels:
        same = [a.split("/")[: row["level"]] == b.split("/")[: row["level"]] for a, b in pairs]
        assert row["top1"] == pytest.approx(sum(same) / len(pairs))
    page = Page(run / "report.html")
    assert "The tree of classes" in page.text
    assert len([span for span in page.all("span") if span.get("title") == "low/round/digit 0"]) >= 1
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert f"level 1 {100 * levels[0]['top1']:.1f} %" in capsys.readouterr().out
    shutil.copytree(run, tmp_path / "same")
    assert main(["compare", str(run), str(tmp_path / "same"), "--out", str(tmp_path / "compared.html")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "right at level 3" in out
    compared = " ".join(Page(tmp_path / "compared.html").text.split())
    assert "Mistakes inside the parent" in compared
    inside = " ".join(tree.inside(test["tree"], test["n"]).split())
    for text in (compared, out):
        assert re.search(rf"% {inside}( |$)", text.replace(" %", "%").replace("%", " %")), "the same figure on the page and the terminal"


def test_without_depth_there_is_no_tree(finished_run: Path) -> None:
    assert "tree" not in json.loads((finished_run / "test_metrics.json").read_text())
    assert "The tree of classes" not in Page(finished_run / "report.html").text
