"""Temperature scaling: fitted on val, kept with the weights, used where probabilities leave the house."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALL, HEAD
from scipy.special import log_softmax, softmax

import tltrain
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import Split, open_images
from tltrain.data.views import Preprocess, Views
from tltrain.evaluation.calibration import LEAST, fit_temperature
from tltrain.evaluation.metrics import Predictions, calibration_error, details, reliability
from tltrain.models.factory import WeightsMetadata, read_card, write_weights
from tltrain.training.run import train

Made = Callable[..., Recipe]


def drawn(num: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are too large by `temperature`, with labels drawn from what they would be without it."""
    rng = np.random.default_rng(seed)
    true_NK = rng.normal(size=(num, 6)) * 2
    labels = np.array([rng.choice(6, p=p) for p in softmax(true_NK, axis=1)])
    return true_NK * temperature, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_made_the_logits_is_found(temperature: float) -> None:
    logits, labels = drawn(8000, temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_no_other_temperature_has_a_smaller_cross_entropy() -> None:
    logits, labels = drawn(500, 2.0)
    eps = 1 / 502
    target = np.full(logits.shape, eps / 5)
    target[np.arange(500), labels] = 1 - eps

    def loss(t: float) -> float:
        return float(-(target * log_softmax(logits / t, axis=1)).sum(1).mean())

    found = fit_temperature(logits, labels)
    assert loss(found) <= min(loss(t) for t in np.linspace(0.2, 10, 2000)) + 1e-9


def test_a_network_that_is_always_right_is_not_made_certain() -> None:
    labels = np.arange(40) % 4
    logits = np.eye(4)[labels] * 3.0
    temperature = fit_temperature(logits, labels)
    assert temperature > 2 * LEAST
    assert 0.95 < softmax(logits / temperature, axis=1).max(1)[0] < 0.99  # 41 of 42, as Platt has it


def test_the_error_becomes_smaller_on_other_images() -> None:
    logits, labels = drawn(4000, 3.0, seed=1)
    temperature = fit_temperature(*drawn(1000, 3.0, seed=2))
    before, after = softmax(logits, axis=1), softmax(logits / temperature, axis=1)
    n = len(labels)
    p = Predictions(np.arange(n), labels, logits.argmax(1), before.max(1), np.zeros(n), np.ones(n, bool), after.max(1), temperature)
    said = details(p, [*"abcdef"])
    assert said["calibration"]["temperature"] == temperature
    assert calibration_error(p) > 0.15
    assert said["calibration"]["ece"] < 0.03
    assert said["reliability"] == reliability(p)
    assert said["calibration"]["reliability"] != said["reliability"]


def test_the_card_keeps_it_and_older_files_have_none(tmp_path: Path) -> None:
    card = WeightsMetadata("resnet-micro", {}, (0.5,) * 3, (0.5,) * 3, 32, 32, "bilinear", ("a", "b"), 1.25)
    write_weights(tmp_path / "w.safetensors", {"x": torch.zeros(1)}, card)
    assert read_card(tmp_path / "w.safetensors") == card
    raw = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(raw.replace(b', \\"temperature\\": 1.25', b" " * 23))
    old = read_card(tmp_path / "w.safetensors")
    assert old is not None
    assert old.temperature == 1.0


def said_of(run: tltrain.Run, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The network's own logits, not yet calibrated, and the labels of the 40 images of a split that a run of `made_recipe` evaluates."""
    positions = [i * len(split) // 40 for i in range(40)]
    views = Views(split, Preprocess(32, 32), "none", False, 0)
    with torch.no_grad():
        calibrated_NK = run.model(torch.stack([views.view(i, 0) for i in positions])).double().numpy()
    return calibrated_NK * run.metrics["calibration"]["temperature"], split.labels[positions]


def test_a_run_fits_it_on_val_keeps_it_and_uses_it(made_recipe: Made, tmp_path: Path) -> None:
    stages = [HEAD | {"steps": 25, "lr": 0.1}, ALL | {"steps": 10}]
    train(made_recipe(stages=stages), RunFlags(folder=tmp_path / "run", workers=0))
    card = read_card(tmp_path / "run" / "weights.safetensors")
    assert card is not None
    assert card.temperature != 1.0
    run = tltrain.load(tmp_path / "run")
    images = open_images(run.recipe.data)
    assert images.val is not None
    assert images.test is not None
    on_val, on_test = (fit_temperature(*said_of(run, split)) for split in (images.val, images.test))
    assert card.temperature == pytest.approx(on_val, rel=1e-4)
    assert on_test != pytest.approx(on_val, rel=0.02), "val and test would give the same"
    test = json.loads((tmp_path / "run" / "test_metrics.json").read_text())
    assert test["calibration"]["temperature"] == card.temperature
    with (tmp_path / "run" / "test_predictions.csv").open() as file:
        said = [float(row["confidence"]) for row in csv.DictReader(file)]
    assert np.mean(said) == pytest.approx(sum(b["n"] * b["confidence"] for b in test["calibration"]["reliability"]) / test["n"], abs=1e-6)
    assert np.mean(said) != pytest.approx(sum(b["n"] * b["confidence"] for b in test["reliability"]) / test["n"], abs=1e-6)
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"divide the logits by a temperature of {card.temperature:.2f}, fitted on val" in report
    assert "Accuracy over confidence, calibrated, %" in report
    # a student that starts from these weights has a new head, and is not calibrated yet
    recipe = made_recipe(backbone={"weights": str(tmp_path / "run")}, stages=[HEAD | {"carry": "last"}], data={"val_fraction": 0})
    train(recipe, RunFlags(folder=tmp_path / "next", workers=0))
    card = read_card(tmp_path / "next" / "weights.safetensors")
    assert card is not None
    assert card.temperature == 1.0
    assert "fitted on val" not in (tmp_path / "next" / "report.html").read_text()
    assert tltrain.load(tmp_path / "next").metrics["calibration"]["temperature"] == 1.0
