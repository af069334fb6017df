"""Verbs that take runs of several labels an image: soups, depths that are raced, students."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import made_recipe
from label_files import label_pictures
from sklearn.metrics import average_precision_score
from torch import nn

import tltrain
from tltrain.cli.main import main
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import open_images
from tltrain.distilling import choose
from tltrain.evaluation.evaluate import evaluate
from tltrain.evaluation.trained import load_trained
from tltrain.models.metadata import read_card
from tltrain.runs import run_dir
from tltrain.runs.record import read_race
from tltrain.training.depths import race
from tltrain.training.losses.ensemble import Ensemble
from tltrain.training.run import train

HEAD = {"name": "head", "unfreeze": "head", "steps": 10, "lr": 0.05, "views": 1}
TOP = {"name": "top", "unfreeze": "layer4", "steps": 6, "lr": 0.01, "views": 1}


def _recipe(root: Path, **changes: Any) -> Recipe:
    data = {
        "source": f"csv:{root}/sets.csv", "label_separator": "|", "size": 16, "resize": 16, "per_class": None, "val_fraction": 0.2,
        "eval_limit": None,
    }  # fmt: skip
    return made_recipe(**{"data": data, "select": "map", "stages": [HEAD, TOP], **changes})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    label_pictures(root, 120)
    return root


@pytest.fixture(scope="module")
def runs(pictures: Path) -> list[Path]:
    """Two seeds."""
    for seed in range(2):
        assert train(_recipe(pictures, seed=seed), RunFlags(folder=pictures / f"{seed}", workers=0))["outcome"] == "finished"
    return [pictures / f"{seed}" for seed in range(2)]


def test_a_soup_of_labels_names_them_by_thresholds_of_its_own(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soup", *map(str, runs), "--out", str(tmp_path / "soup"), "--method", "uniform", "--test"]) == 0
    said = capsys.readouterr().out
    assert "val mAP" in said
    found = {name: evaluate(path, None, "val", 16) for name, path in (("soup", tmp_path / "soup"), ("first", runs[0]))}
    row = next(line.split() for line in said.splitlines() if line.startswith("uniform"))
    assert row[1] == f"{100 * found['soup']['map']:.2f}"
    cards = [read_card(path / "weights.safetensors") for path in (tmp_path / "soup", runs[0])]
    assert cards[0] is not None
    assert cards[1] is not None
    assert cards[0].thresholds != cards[1].thresholds
    assert found["first"]["map"] > 0.5, "a random order has 0.37"


@pytest.mark.slow
def test_a_depth_is_raced_for_by_mean_average_precision(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "MOST_CUTS", 1)
    recipe = _recipe(pictures, stages=[HEAD, TOP | {"unfreeze": "auto", "carry": "last"}])
    assert train(recipe, RunFlags(folder=tmp_path / "run", workers=0))["outcome"] == "finished"
    said = read_race(tmp_path / "run")["top"]
    assert said.startswith("race on 96 images by mAP, each judged by a network that never saw it: head ")
    assert run_dir.read_recipe(tmp_path / "run").stages[1].unfreeze != "auto"


def test_a_student_is_set_against_its_teachers_of_labels(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "LEAST_STEPS", 6)
    monkeypatch.setattr(choose, "EPOCHS", ((10**12, 1.0),))
    monkeypatch.setattr(choose, "VIEWS", (2,))
    folder = tmp_path / "small"
    assert main(["distil", *map(str, runs), "--to", "resnet-micro", "--folder", str(folder), "--workers", "0"]) == 0
    assert "the student's mean average precision is " in " ".join(capsys.readouterr().out.split())
    recipe, found = run_dir.read_recipe(folder / "run"), json.loads((folder / "run" / "distilled.json").read_text())
    assert (recipe.data.label_separator, recipe.select) == ("|", "map")
    test = run_dir.test_metrics(folder / "run")
    assert test is not None
    assert found["student_map"][0] == pytest.approx(test["map"], abs=1e-4), "files write six digits"
    split = open_images(recipe.data).test
    assert split is not None
    files = [runs[0].parent / name for name in split.ids]
    mean_NK = np.mean([_shares(run, files) for run in runs], axis=0)
    order = [load_trained(runs[0]).card.classes.index(name) for name in ("row", "column", "square")]  # type: ignore[union-attr]
    each = [average_precision_score(split.labels[:, k], mean_NK[:, k]) for k in order]
    assert found["teacher_map"][0] == pytest.approx(np.mean(each), abs=0.02), "the mean of two networks' probabilities"
    assert "Test mAP" in (folder / "run" / "report.html").read_text()


def _shares(run: Path, files: list[Path]) -> np.ndarray:
    """(N, K) calibrated probabilities of a run."""
    answers = tltrain.load(run).predict(files, top=3)
    names = load_trained(run).card.classes or ()
    return np.array([[dict(answer.top)[name] for name in names] for answer in answers])


def test_the_mean_of_networks_is_of_each_labels_probability() -> None:
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(3)]
    images = torch.rand(5, 3, 2, 2)
    mean = torch.stack([(net(images) / 4.0).sigmoid() for net in nets]).mean(0)
    torch.testing.assert_close((Ensemble(nets, 4.0, several=True)(images) / 4.0).sigmoid(), mean)  # type: ignore[arg-type]


def test_under_corruptions_an_image_is_right_where_all_its_labels_are(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(runs[0]), "--corruptions", "jpeg,contrast", "--severities", "5", "--against", str(runs[1])]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "all labels right, %" in said
    shown, test = json.loads((runs[0] / "corruptions" / "figures.json").read_text()), run_dir.test_metrics(runs[0])
    assert test is not None
    assert shown["clean"][0] == pytest.approx(test["subset_accuracy"]), "as in the run's own test, by its own thresholds"
    assert shown["mean"][0] < shown["clean"][0]
    page = (runs[0] / "corruptions" / "corruptions.html").read_text()
    assert "have all labels right on average over the corruptions" in page
    assert "Right, %" not in page + (runs[0] / "corruptions" / "against.html").read_text()
    lines = (runs[0] / "corruptions" / "answers.jsonl").read_text().splitlines()
    assert {name for text in json.loads(lines[1])["predicted"] for name in text.split("|")} <= {"", "row", "column", "square"}
    assert main(words) == 0
    assert "0 passes" not in capsys.readouterr().out
    assert (runs[0] / "corruptions" / "answers.jsonl").read_text().splitlines() == lines, "what is there is not measured again"
