"""Folders of folds as `tltrain folds` leaves them, without a training: for the tests of what reads them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from tltrain.core.output import escape
from tltrain.core.recipe import Backbone, Data, Recipe, Stage
from tltrain.data.splits import folds
from tltrain.evaluation import metrics
from tltrain.evaluation.metrics import Predictions

CLASSES = ("cat", "dog", "=owl", "fox", "gnu", "hen")


def recipe_of(fold: int, k: int, repeat: int, lr: float = 0.001) -> Recipe:
    data = Data(source="folder:photos", folds=k, fold=fold, repeat=repeat)
    stages = (Stage(name="head", unfreeze="head", steps=60, lr=lr),)
    return Recipe(name="photos", batch=8, data=data, backbone=Backbone(name="resnet50"), stages=stages)


def labels_of(n: int) -> np.ndarray:
    return np.arange(n) % len(CLASSES)


def predicted(n: int, repeat: int, skill: float) -> Predictions:
    """What the networks of a repeat say of all images: those with a low number are hard in every repeat."""
    rng = np.random.default_rng([n, repeat, int(1000 * skill)])
    label = labels_of(n)
    right = rng.random(n) < skill * np.linspace(0.4, 1.2, n)
    guess = np.where(right, label, (label + 1 + rng.integers(0, 2, n)) % len(CLASSES))
    confidence, loss = rng.uniform(0.2, 1, n), rng.gamma(1, 1, n)
    return Predictions(np.arange(n), label, guess, confidence, loss, right | (rng.random(n) < 0.5), confidence**1.5, 1.4)


def part(p: Predictions, which: np.ndarray) -> Predictions:
    names = ("position", "label", "predicted", "confidence", "loss", "in_top5", "calibrated")
    return replace(p, **{name: getattr(p, name)[which] for name in names})


def folds_folder(path: Path, n: int = 120, k: int = 3, repeats: int = 1, skill: float = 0.8, lr: float = 0.001) -> Path:
    path.mkdir(parents=True)
    (path / "folds.json").write_text(json.dumps({"k": k, "repeats": repeats}))
    for repeat in range(repeats):
        fold_N, whole = folds(labels_of(n), np.arange(n), k, repeat), predicted(n, repeat, skill)
        for fold in range(k):
            _write_run(path / f"r{repeat}-f{fold}", recipe_of(fold, k, repeat, lr), part(whole, fold_N == fold))
    return path


def _write_run(run: Path, recipe: Recipe, p: Predictions) -> None:
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    figures = {"split": "test", **metrics.summary(p, len(CLASSES)), "weights": "best", "seconds": 10.0, **metrics.details(p, CLASSES)}
    with (run / "test_predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "predicted", "confidence"])
        for i, label, guess, confidence in zip(p.position, p.label, p.predicted, p.calibrated, strict=True):
            names = [escape.csv_cell(text) for text in (f"{CLASSES[label]}/{i:04d}.jpg", CLASSES[label], CLASSES[guess])]
            writer.writerow([*names, confidence])
    wrong = np.flatnonzero(p.predicted != p.label)
    surest = wrong[np.argsort(-p.calibrated[wrong])][:24]
    mistakes = [
        {"id": f"{i}", "label": CLASSES[p.label[i]], "predicted": CLASSES[p.predicted[i]], "confidence": p.calibrated[i], "png": PNG}
        for i in surest.tolist()
    ]
    for name, value in (("test_metrics", figures), ("mistakes", mistakes), ("outcome", {"outcome": "finished", "peak_bytes": 1e9})):
        (run / f"{name}.json").write_text(json.dumps(value))
    row = {
        "kind": "stage_end",
        "stage": "head",
        "stage_index": 0,
        "step": 60,
        "run_step": 60,
        "reason": "finished",
        "seconds": 9.0,
        "time": 0,
    }
    (run / "metrics-000001.jsonl").write_text(json.dumps({"kind": "start", "from": None}) + "\n" + json.dumps(row) + "\n")


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFUlEQVR4nGP8z8DAwMDAxAADCBYAFh8BA5OQ3wAAAAAASUVORK5CYII="
