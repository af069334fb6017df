"""How long the plan says that a run will take: each part of it counted once, at the speeds that were measured."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tltrain.cache.cost_model import Budget, Choice, Speed
from tltrain.cache.measure import Machine, _Meter
from tltrain.cache.planner import Choices, StageChoices
from tltrain.core.recipe import Recipe, parse
from tltrain.data import outline_images
from tltrain.planning import run_time
from tltrain.planning.run_time import EVALUATION_S, STEP_S, RunTime
from tltrain.training.experiment import Experiment

RECIPE = """
name: r
batch: 10
data: {source: digits, per_class: 10, test_fraction: 0.2, val_fraction: 0.1}
backbone: {name: resnet-micro}
stages:
  - {name: head, unfreeze: head, steps: 30, lr: 0.1, views: 1, eval_epochs: 100}
  - {name: all, unfreeze: all, steps: 20, lr: 0.1, augment: strong, eval_epochs: 100}
"""
IMAGE_S, WHOLE_S, PREFIX_S = 0.001, 0.010, 0.009


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_time, "forward_s", lambda chain, stop, size, machine: WHOLE_S if stop is None else PREFIX_S)
    monkeypatch.setattr(_Meter, "image_s", lambda self, augment: IMAGE_S)


def expected(recipe: Recipe, head: StageChoices, world: int = 1) -> tuple[RunTime, Experiment]:
    images = outline_images(recipe.data)
    experiment = Experiment.outline(recipe, images)
    machine = Machine(torch.device("cpu"), "no", contextlib.nullcontext, 0, 1)
    choices = Choices((head, StageChoices()), None, Budget(0, 0, 0))
    found = run_time.run_time(recipe, images, experiment.student, None, experiment.plan, machine, choices, world)
    assert found is not None
    return found, experiment


def test_steps_views_evaluations_and_the_test_are_counted_once(speeds: None) -> None:
    found, experiment = expected(parse(RECIPE, "r"), StageChoices())
    images = experiment.images
    assert images.val is not None
    assert images.test is not None
    num_val, num_last = len(images.val), len(images.val) + len(images.test)
    seen_s = IMAGE_S + WHOLE_S
    head = 300 * (IMAGE_S + PREFIX_S + 3 * (WHOLE_S - PREFIX_S)) + 30 * STEP_S + 2 * (num_val * seen_s + EVALUATION_S)
    assert found.stages == pytest.approx((head, 200 * (IMAGE_S + 3 * WHOLE_S) + 20 * STEP_S + 2 * (num_val * seen_s + EVALUATION_S)))
    assert found.rest == pytest.approx(num_last * seen_s)
    assert found.after(0) == pytest.approx(found.stages[1] + found.rest)
    shared, _ = expected(parse(RECIPE, "r"), StageChoices(), world=4)
    assert shared.total == pytest.approx(found.total / 4)


def test_what_is_stored_is_computed_once(speeds: None) -> None:
    stored = Choice("head", "features", 100, 1, Speed(IMAGE_S, PREFIX_S, 8), 1.0, "memory")
    found, experiment = expected(parse(RECIPE, "r"), StageChoices(stored, replace(stored, num_rows=50)))
    assert experiment.images.val is not None
    trained_s = WHOLE_S - PREFIX_S
    filled = 150 * (IMAGE_S + PREFIX_S)
    assert found.stages[0] == pytest.approx(
        filled + 300 * 3 * trained_s + 30 * STEP_S + 2 * (len(experiment.images.val) * trained_s + EVALUATION_S)
    )


def test_a_head_is_worked_out_by_one_process(speeds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    recipe = parse(RECIPE.replace("steps: 30, lr: 0.1, views: 1", "solve: ridge, views: 2, augment: light"), "r")

    def free(*arguments: object) -> float:
        asked.append(arguments)
        return 0.0

    monkeypatch.setattr(run_time, "solve_s", free)
    without, experiment = expected(recipe, StageChoices(), world=4)
    monkeypatch.setattr(run_time, "solve_s", lambda *arguments: 7.0)
    found, _ = expected(recipe, StageChoices(), world=4)
    assert found.stages == pytest.approx((without.stages[0] + 7.0, without.stages[1]))
    assert asked == [("ridge", 2 * len(experiment.images.train), 64, 10)], "two views of each image, 64 features, 10 classes"


def test_the_line_of_the_plan_says_how_sure_it_is() -> None:
    line = RunTime((60.0, 600.0), 60.0).line(["head", "all"])
    assert line == (
        "time    about 12 min 00 s (head 1 min 00 s, all 10 min 00 s), likely 6 min 00 s to 24 min 00 s: "
        "by forward passes and views timed here"
    )
    assert RunTime((60.0,), 0.0, busy=True).line(["head"]).endswith("timed here, while other programs kept this machine busy")


def test_a_plan_on_a_narrow_terminal_breaks_between_stages_and_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tltrain.core.output import wrapping
    from tltrain.core.output.console import Console
    from tltrain.core.recipe import load
    from tltrain.training import plan_table

    recipe = load("folder-resnet50").model_copy(update={"purpose": "for " + "many " * 60 + "images"})
    recipe = recipe.override({"data.source": "digits", "backbone.name": "resnet-micro", "backbone.weights": None, "data.size": 32})
    experiment = Experiment.outline(recipe, outline_images(recipe.data))
    table = plan_table.render(recipe, experiment.student.chain, experiment.plan, 1, 1, "data    many", ["head: " + "word " * 40])
    console = Console(enabled=True)
    console.rich.width = 60
    with monkeypatch.context() as terminal:
        terminal.setattr(wrapping, "width_of", lambda stream: 60)
        console.show(table)
    narrow = capsys.readouterr().out.splitlines()
    assert max(map(len, narrow)) <= 60
    assert sum(line.startswith("block ") for line in narrow) == 2, "two tables, since three stages do not fit"
    at = next(i for i, line in enumerate(narrow) if line.startswith("cache   head: word"))
    assert narrow[at + 1].startswith("        word"), "a line goes on behind its first word"
    wide = plan_table.text(table)
    assert wide.count("\nblock ") == 1
    assert wide.splitlines()[0] == f"{recipe.name}: {recipe.purpose}", "in a file a line is a line"
    assert "head: " + "word " * 39 + "word" in wide


def test_images_that_are_not_there_give_no_estimate(tmp_path: Path) -> None:
    recipe = parse(RECIPE.replace("source: digits", "source: cifar10"), "r")
    images = outline_images(recipe.data)
    experiment = Experiment.outline(recipe, images)
    machine = Machine(torch.device("cpu"), "no", contextlib.nullcontext, 0, 1)
    choices = Choices((StageChoices(), StageChoices()), None, Budget(0, 0, 0))
    assert run_time.run_time(recipe, images, experiment.student, None, experiment.plan, machine, choices) is None
