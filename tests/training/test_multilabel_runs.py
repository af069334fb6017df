"""Runs of several labels an image: trained, stopped and resumed, evaluated, asked, exported, compared."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import made_recipe
from label_files import label_pictures
from safetensors.torch import load_file

import tltrain
from benchmarks import world
from benchmarks.world import Trial
from tltrain.commands import predict as command
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import open_images
from tltrain.evaluation import exporters
from tltrain.evaluation.evaluate import evaluate
from tltrain.evaluation.promises.fitted import Wanted, rules_for
from tltrain.evaluation.promises.terminal import lines_of
from tltrain.evaluation.trained import load_trained, probabilities
from tltrain.models.metadata import read_card
from tltrain.runs import run_dir
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.pages.comparison import compared_run
from tltrain.runs.record import read_run
from tltrain.training.experiment import Experiment
from tltrain.training.run import train

HEAD = {"name": "head", "unfreeze": "head", "steps": 10, "lr": 0.05, "views": 1}
TOP = {"name": "top", "unfreeze": "layer3", "steps": 12, "lr": 0.005, "mixup": 0.2, "label_smoothing": 0.05, "augment": "light"}


def _recipe(root: Path, **changes: Any) -> Recipe:
    data = {
        "source": f"csv:{root}/sets.csv", "label_separator": "|", "size": 16, "resize": 16, "per_class": None, "val_fraction": 0.2,
        "eval_limit": None, "balance": "weights",
    }  # fmt: skip
    return made_recipe(data=data, select="map", stages=[HEAD, TOP], **changes)


def _trained(recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    assert train(recipe, RunFlags(folder=folder, workers=0))["outcome"] == "finished"
    return load_file(folder / "weights.safetensors")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    label_pictures(root, 120)
    return root


@pytest.fixture(scope="module")
def run(pictures: Path) -> Path:
    """A finished run that has learned what a row, a column and a square are."""
    _trained(_recipe(pictures), pictures / "run")
    return pictures / "run"


def test_a_run_learns_its_labels_and_keeps_what_was_fitted_on_val(run: Path) -> None:
    test, card = run_dir.test_metrics(run), read_card(run / "weights.safetensors")
    assert test is not None
    assert test["map"] > 0.75  # a random order has 0.37
    assert [row["name"] for row in test["per_label"]] == ["column", "row", "square"]
    assert card is not None
    assert card.thresholds == tuple(row["threshold"] for row in test["per_label"]) != (0.5, 0.5, 0.5)
    assert card.temperature == test["calibration"]["temperature"] != 1
    best = [row["map"] for row in read_rows(run) if row["kind"] == "val" and row["best"]]
    assert best == sorted(best)


def test_evaluate_repeats_the_test_to_the_last_bit(run: Path) -> None:
    test, again = run_dir.test_metrics(run), evaluate(run, None, "test", 128)
    assert test is not None
    assert again["notes"] == []
    assert {key: again[key] for key in ("map", "f1_macro", "auroc_macro", "loss", "per_label")} == {
        key: test[key] for key in ("map", "f1_macro", "auroc_macro", "loss", "per_label")
    }
    others = evaluate(run, f"csv:{run.parent}/sets.csv", "all", 128)
    assert others["n"] == 120


def test_mistakes_are_shown_with_the_labels_that_were_missed_and_those_that_were_wrongly_said(run: Path) -> None:
    with (run / "test_predictions.csv").open(encoding="utf-8") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    shown, page = run_dir.mistakes(run), (run / "report.html").read_text(encoding="utf-8")
    wrong = {name for name, row in rows.items() if row["label"] != row["predicted"]}
    assert 0 < len(shown) == min(len(wrong), 24)
    for item in shown:
        row = rows[item["id"]]
        has, said = ({*row[key].split("|")} - {""} for key in ("label", "predicted"))
        assert {name for name, _ in item["missed"]} == has - said
        assert {name for name, _ in item["wrong"]} == said - has
        doubted = [1 - share for _, share in item["missed"]] + [share for _, share in item["wrong"]]
        assert item["confidence"] == max(doubted)
        assert all(share == pytest.approx(float(row[f"p:{name}"]), abs=1e-6) for name, share in item["missed"] + item["wrong"])
        assert f">{item['id']}<" in page
    sure = [item["confidence"] for item in shown]
    assert sure == sorted(sure, reverse=True)
    assert "missed <b>" in page or "said <b>" in page


def test_predict_names_the_labels_above_their_thresholds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "test_predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    answers = tltrain.load(run).predict([run.parent / row["id"] for row in rows])
    named = [answer.labels or () for answer in answers]
    thresholds = dict(zip(("column", "row", "square"), load_trained(run).card.thresholds or (), strict=True))
    assert len(set(named)) > 2
    for row, answer, labels in zip(rows, answers, named, strict=True):
        assert "|".join(sorted(labels)) == row["predicted"]
        assert dict(answer.top) == pytest.approx({name: float(row[f"p:{name}"]) for name in thresholds}, abs=2e-5)
        assert {name for name, share in answer.top if share >= thresholds[name]} == set(labels)
    files = [str(run.parent / row["id"]) for row in rows[:3]]
    assert command.predict_files(run, files, "csv", 5)
    shown = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [json.loads(line["labels"]) for line in shown] == [list(labels) for labels in named[:3]]
    assert command.predict_files(run, files, "json", 5)
    assert [line["labels"] for line in json.loads(capsys.readouterr().out)] == [list(labels) for labels in named[:3]]
    assert command.predict_files(run, files, "table", 5)


@pytest.mark.parametrize("wanted", [Wanted(coverage=0.9), Wanted(abstain=0.9), Wanted(strangers=True), Wanted(num_views=3)])
def test_what_is_of_one_class_an_image_is_refused(run: Path, wanted: Wanted) -> None:
    with pytest.raises(UserError, match="names several labels an image, and --"):
        rules_for(run, wanted, print)


def test_a_metric_of_one_class_is_refused_before_the_first_step(pictures: Path, tmp_path: Path) -> None:
    recipe = _recipe(pictures).override({"select": "top1"})
    with pytest.raises(UserError, match="several labels an image; choose map"):
        train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="choose top1"):
        train(made_recipe(select="map"), RunFlags(folder=tmp_path / "run", workers=0))


@pytest.mark.parametrize("solve", ["ridge", "logistic"])
def test_a_solved_head_names_labels_and_is_tried_with_smoke(pictures: Path, tmp_path: Path, solve: str) -> None:
    stage = {"name": "head", "unfreeze": "head", "solve": solve, "views": 3, "augment": "light"}
    recipe = _recipe(pictures).override({"stages": [stage], "data.balance": "none"})
    _trained(recipe, tmp_path / "run")
    test, card = run_dir.test_metrics(tmp_path / "run"), read_card(tmp_path / "run" / "weights.safetensors")
    assert test is not None
    assert test["map"] > 0.6  # a random order has 0.37
    assert card is not None
    assert card.thresholds is not None
    _trained(recipe.smoke(), tmp_path / "smoke")
    few = open_images(run_dir.read_recipe(tmp_path / "smoke").data).train
    assert (few.labels.sum(0) >= 4).all()
    assert len(few) <= 16


def test_a_student_learns_the_labels_of_its_teacher_alone(pictures: Path, run: Path, tmp_path: Path) -> None:
    recipe = _recipe(pictures).override({"stages": [HEAD | {"steps": 20}], "distill": {"teacher": {"weights": str(run)}, "weight": 1.0}})
    _trained(recipe, tmp_path / "student")
    rows = [row["loss"] for row in read_rows(tmp_path / "student") if row["kind"] == "train"]
    assert 0 <= rows[-1] < 0.7 * rows[0]
    with pytest.raises(UserError, match="names several labels an image, and this recipe one class"):
        Experiment.open(made_recipe(distill={"teacher": {"weights": str(run)}}), open_images(recipe.data))


def test_a_val_in_which_nothing_has_a_label_is_refused_before_the_first_step(pictures: Path, tmp_path: Path) -> None:
    rows = (pictures / "sets.csv").read_text(encoding="utf-8").splitlines()[1:]
    table = ["path,label,split", *(f"{pictures}/{row},train" for row in rows if not row.endswith(","))]
    table += [f"{pictures}/{row},val" for row in rows if row.endswith(",")]
    (tmp_path / "t.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    recipe = _recipe(pictures).override({"data.source": f"csv:{tmp_path}/t.csv"})
    with pytest.raises(UserError, match=r"select is map, which has no value on val: its [0-9]+ images have none of the labels"):
        train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    assert not (tmp_path / "run").exists()
    _trained(recipe.override({"select": "loss", "stages": [HEAD | {"steps": 1}]}), tmp_path / "run")


def test_images_without_one_of_the_labels_are_evaluated_and_it_is_said_which(run: Path, tmp_path: Path) -> None:
    rows = (run.parent / "sets.csv").read_text(encoding="utf-8").splitlines()[1:]
    table = ["path,label", *(f"{run.parent}/{row}" for row in rows if "square" not in row)]
    (tmp_path / "t.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    figures = evaluate(run, f"csv:{tmp_path}/t.csv", "all", 128)
    assert figures["n"] == len(table) - 1
    assert "no image here has the labels square; means over labels go over the others" in figures["notes"]
    known = {row["name"]: row["ap"] for row in figures["per_label"]}
    assert known["square"] is None
    assert figures["map"] == pytest.approx((known["row"] + known["column"]) / 2)
    (tmp_path / "t.csv").write_text("\n".join([*table[:1], *(line for line in table if line.endswith(",row"))]) + "\n", encoding="utf-8")
    assert "column, square" in " ".join(evaluate(run, f"csv:{tmp_path}/t.csv", "all", 128)["notes"])
    (tmp_path / "t.csv").write_text("\n".join([*table[:1], *(line for line in table if line.endswith(","))]) + "\n", encoding="utf-8")
    figures = evaluate(run, f"csv:{tmp_path}/t.csv", "all", 128)
    assert figures["map"] is None
    shown = dict(line.split(maxsplit=1) for line in lines_of({**figures, "subset_low": 0.0, "subset_high": 1.0}) if line.startswith("mAP"))
    assert shown["mAP"] == "\u2013"


def test_pages_and_comparisons_count_images_with_all_labels_right(run: Path) -> None:
    page, test = (run / "report.html").read_text(encoding="utf-8"), run_dir.test_metrics(run)
    assert test is not None
    for word in ("Label by label", "Test mAP", "binary cross entropy", "square", "all labels are right"):
        assert word in page
    assert "Confusion" not in page
    entry = compared_run("a", read_run(run))
    assert entry.accuracy is not None
    assert entry.accuracy.value == test["subset_accuracy"]
    assert entry.predicted is not None
    assert entry.predicted.right.mean() == test["subset_accuracy"]


def test_an_export_says_that_labels_are_several(run: Path) -> None:
    done = exporters.export(run, "torch-export")
    text = (done.folder / "README.md").read_text(encoding="utf-8")
    assert "multi_label_classification" in text
    assert "| square | " in text
    assert "no softmax" in text


@pytest.mark.slow
def test_an_export_to_transformers_gives_each_label_its_own_probability(pictures: Path, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import pipeline

    recipe = _recipe(pictures).override({"backbone": {"name": "vit-tiny", "weights": None}, "data.size": 32, "data.resize": 32})
    recipe = recipe.override({"stages": [HEAD | {"steps": 2}]})
    _trained(recipe, tmp_path / "run")
    folder = exporters.export(tmp_path / "run", "hf").folder
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert said["problem_type"] == "multi_label_classification"
    with Image.open(pictures / "0.png") as picture:
        theirs = {row["label"]: row["score"] for row in pipeline("image-classification", model=str(folder))(picture.convert("RGB"))}
    trained = load_trained(tmp_path / "run")
    assert sorted(theirs) == ["column", "row", "square"]
    own = tltrain.load(tmp_path / "run").predict(pictures / "0.png")
    assert dict(own.top) == pytest.approx(theirs, abs=0.02)
    assert probabilities(trained, torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_run_that_was_stopped_ends_with_the_same_weights(pictures: Path, run: Path, tmp_path: Path) -> None:
    def stop(stage: str, step: int) -> None:
        if (stage, step) == ("top", 5):
            os.kill(os.getpid(), signal.SIGTERM)

    recipe, whole = _recipe(pictures), load_file(run / "weights.safetensors")
    assert train(recipe, RunFlags(folder=tmp_path / "resumed", workers=0), on_step=stop)["outcome"] == "stopped"
    resumed = _trained(recipe, tmp_path / "resumed")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert (tmp_path / "resumed" / "weights.safetensors").read_bytes() == (run / "weights.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(pictures: Path, run: Path, tmp_path: Path) -> None:
    trial = Trial(_recipe(pictures).model_dump(mode="json"), str(tmp_path / "two"), world=2, start={"workers": 0})
    two = world.finish(trial)
    pairs = [[row["loss"] for row in read_rows(each) if row["kind"] in ("train", "val")] for each in (two, run)]
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-3)
    one, other = run_dir.test_metrics(run), run_dir.test_metrics(two)
    assert one is not None
    assert other is not None
    assert other["map"] == pytest.approx(one["map"], abs=0.02)


def test_a_smoke_run_of_columns_ends(pictures: Path, tmp_path: Path) -> None:
    source = {
        "source": f"csv:{pictures}/columns.csv",
        "label_separator": None,
        "label_columns": ["Row", "Column", "Square"],
        "balance": "none",
    }
    recipe = _recipe(pictures).override({"data": source, "data.val_fraction": 0, "stages": [HEAD | {"carry": "last"}]}).smoke()
    _trained(recipe, tmp_path / "run")
    card = read_card(tmp_path / "run" / "weights.safetensors")
    assert card is not None
    assert (card.classes, card.thresholds) == (("Row", "Column", "Square"), (0.5, 0.5, 0.5))
    assert np.isfinite(run_dir.test_metrics(tmp_path / "run")["loss"])  # type: ignore[index]
