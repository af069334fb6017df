"""The learning-rate range test: the rise, what it says of a loss, and the verb."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from cli_words import mistake

from tltrain.cli.main import main
from tltrain.core import stage_plan
from tltrain.core.errors import UserError
from tltrain.core.recipe import load
from tltrain.fitting.lr_range import find_rate, range_recipe
from tltrain.runs.metrics_log import read_rows

RATES = np.geomspace(1e-6, 1.0, 100).tolist()


def bowl(at: float, width: float = 1.0) -> list[float]:
    """A loss that stands still, falls where the rate is near `at`, and explodes two powers of ten later."""
    x = np.log10(RATES)
    fall = 1 / (1 + np.exp(-(x - math.log10(at)) / (0.25 * width)))
    return (2.3 - 1.8 * fall + 10.0 ** np.clip(3 * (x - math.log10(at) - 2), -9, 3)).tolist()


@pytest.mark.parametrize("at", [1e-4, 3e-4, 1e-3])
def test_the_rate_at_which_the_loss_falls_fastest_is_found(at: float) -> None:
    found = find_rate(RATES, bowl(at))
    assert found.steepest is not None
    assert at / 2 < found.steepest < 4 * at, "smoothing comes late, by less than a factor of four"
    assert found.lowest > found.steepest
    assert found.suggested is not None
    assert found.suggested <= found.lowest / 10 * 1.06
    assert len(found.lr) < 100, "what exploded is left out"


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    assert find_rate(RATES, [2.3] * 100).suggested is None
    assert find_rate(RATES, [2.3 + i / 50 for i in range(100)]).suggested is None
    assert find_rate(RATES, [math.nan] * 100).suggested is None


def test_a_loss_that_is_not_finite_ends_the_test() -> None:
    loss = bowl(1e-3)
    loss[80:] = [math.inf] * 20
    assert find_rate(RATES, loss).steepest == find_rate(RATES, bowl(1e-3)).steepest


def test_the_rate_rises_by_one_factor_to_the_highest() -> None:
    class Blocks:
        blocks = tuple(type("Block", (), {"distances": None})() for _ in range(2))

        def index(self, name: str) -> int:
            return 1 if name == "head" else 0

    recipe = range_recipe(load("digits-resnet"), "head", 50, 0.5)
    (stage,) = stage_plan.plan(recipe, Blocks(), 1000, True)
    rates = [stage.spec.lr * stage.lr_factor(step) for step in range(50) if stage.spec.lr]
    assert rates[-1] == pytest.approx(0.5)
    assert rates[0] == pytest.approx(0.5 * stage_plan.RANGE ** (49 / 50))
    assert np.allclose(np.diff(np.log(rates)), np.diff(np.log(rates))[0])


def test_only_what_comes_before_the_stage_is_trained() -> None:
    recipe = load("digits-resnet")
    rising = range_recipe(recipe, None, 100, 1.0)
    assert [s.name for s in rising.stages] == [s.name for s in recipe.stages]
    assert rising.stages[:-1] == recipe.stages[:-1]
    assert rising.stages[-1].schedule == "range"
    assert rising.data == recipe.data, "the same splits, and the same stores"
    for stage, steps, highest, says in (("deep", 100, 1.0, "the stages of"), (None, 5, 1.0, "fewer than"), (None, 100, 0.0, "above 0")):
        with pytest.raises(UserError, match=says):
            range_recipe(recipe, stage, steps, highest)


def test_the_rate_of_a_stage_that_learns_features_is_looked_for_without_the_stages_behind_it() -> None:
    recipe = load("folder-distil-features")
    (stage,) = range_recipe(recipe, recipe.stages[0].name, 100, 1.0).stages
    assert (stage.name, stage.schedule, stage.lr) == (recipe.stages[0].name, "range", 1.0)


def test_the_verb_leaves_a_curve_and_a_suggestion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "lr"
    words = [
        "lr",
        "digits-resnet",
        "--stage",
        "head",
        "--steps",
        "40",
        "--highest",
        "100",
        "--folder",
        str(folder),
        "--data.per-class",
        "10",
    ]
    assert main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "report " not in printed, "its answer is a rate, and no verdict on the network that it spoils"
    assert "test top-1" not in printed
    assert "loss falls fastest at" in printed
    suggested = float(printed.partition("--stages.head.lr ")[2].split()[0])
    assert 1e-4 <= suggested <= 1
    with (folder / "lr.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [row["lr"] for row in read_rows(folder) if row["kind"] == "train"]
    assert [float(row["lr"]) for row in rows] == rates[: len(rows)]
    assert "steepest" in (folder / "lr.svg").read_text()
    assert "--stage is deep" in mistake(["lr", "digits-resnet", "--stage", "deep"], capsys)
