"""`unfreeze: auto`: which depths are tried, on which images, and that a stop in the race changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL, made_recipe
from safetensors.torch import load_file

from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import open_images
from tltrain.runs import run_dir
from tltrain.runs.record import read_race
from tltrain.training.depths import race
from tltrain.training.depths.hidden import without_test
from tltrain.training.depths.race import candidates, raced_recipes, settled
from tltrain.training.run import train

RIDGE = {"name": "head", "unfreeze": "head", "solve": "ridge", "carry": "last"}
DEEP = ALL | {"name": "deep", "unfreeze": "auto", "steps": 6, "views": 2, "carry": "last"}


def recipe_of(**changes: Any) -> Recipe:
    return made_recipe(stages=[RIDGE, DEEP], **changes)


def test_the_head_four_cuts_and_all_are_tried() -> None:
    stage = recipe_of().stages[1]
    names = ["stem", *(f"layer{k}.{n}" for k in range(1, 5) for n in range(3)), "head"]
    assert candidates(names, stage) == ["head", "layer4.0", "layer3.0", "layer2.0", "layer1.0", "all"]
    assert candidates(["stem", *(f"block.{k}" for k in range(12)), "head"], stage) == [
        "head",
        "block.11",
        "block.8",
        "block.5",
        "block.2",
        "all",
    ]
    assert candidates(["stem", "a", "head"], stage) == ["head", "a", "all"]
    assert candidates(["stem", "a", "head"], stage.model_copy(update={"trains": "lora"})) == ["a", "all"], "a head trains whole"


def test_candidates_differ_in_depth_alone_and_see_no_test_image(tmp_path: Path) -> None:
    recipe = made_recipe(stages=[RIDGE, DEEP | {"steps": 1_000}])
    images = open_images(recipe.data)
    assert images.test is not None
    hidden = without_test(recipe.data, tmp_path / "table.csv")
    tried = raced_recipes(recipe, 1, images, hidden)
    depths = {name: {run.stages[1].unfreeze for run in runs} for name, runs in tried.items()}
    assert depths == {name: {name} for name in tried}
    first = next(iter(tried.values()))
    for runs in tried.values():
        assert [run.data.fold for run in runs] == [0, 1, 2]
        for run, other in zip(runs, first, strict=True):
            assert run.stages[1].steps == 250
            assert all(line.startswith("stages.1.unfreeze") for line in run.differences(other))
    seen = [open_images(run.data) for run in first]
    tested = [set(each.test.ids) for each in seen if each.test is not None]
    assert len(set.union(*tested)) == sum(map(len, tested)), "each image is judged once"
    assert not set(images.test.ids) & set[str]().union(*tested, *(each.train.ids for each in seen))


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "MOST_CUTS", 1)
    monkeypatch.setattr(race, "LEAST_STEPS", 2)


@pytest.mark.slow
@pytest.mark.usefixtures("_short")
def test_a_race_that_is_stopped_goes_on_to_the_same_end_and_is_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, start = recipe_of(), RunFlags(folder=tmp_path / "run", workers=0)

    def stopping(raced: Recipe, flags: RunFlags) -> dict[str, Any]:
        is_second = raced.data.fold == 1 and raced.stages[1].unfreeze == "all"
        return train(raced, flags, lambda stage, step: os.kill(os.getpid(), signal.SIGTERM) if is_second and stage else None)

    ended = settled(recipe, start, stopping)
    assert isinstance(ended, dict)
    assert ended["outcome"] == "stopped"
    assert not (tmp_path / "run").exists()
    assert train(recipe, start)["outcome"] == "finished"
    assert "race on " in capsys.readouterr().out
    kept = run_dir.read_recipe(tmp_path / "run")
    assert kept.stages[1].unfreeze in ("head", "layer4.0", "all")
    (sentence,) = read_race(tmp_path / "run").values()
    assert sentence in (tmp_path / "run" / "report.html").read_text().replace("&#x27;", "'")
    assert train(recipe_of(), RunFlags(folder=tmp_path / "other", workers=0))["outcome"] == "finished"
    mine, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("run", "other"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
    before = sorted((tmp_path / "run-race").rglob("metrics-*.jsonl"))
    assert train(recipe, start)["outcome"] == "finished", "auto is what was chosen"
    assert sorted((tmp_path / "run-race").rglob("metrics-*.jsonl")) == before, "it does not race again"
    with pytest.raises(UserError, match=r"stages\.1\.steps: 6 -> 7"):
        train(recipe.override({"stages.1.steps": 7}), start)


def test_several_processes_take_the_choice_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, start = recipe_of(), RunFlags(folder=tmp_path / "run", workers=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="raced by one process, whose choice several then train with"):
        settled(recipe, start, train)
    assert not (tmp_path / "run").exists()
    chosen = recipe.override({"stages.1.unfreeze": "layer4.0"})
    run_dir.create(tmp_path / "run", chosen)
    assert settled(recipe, start, train) == chosen


def test_the_plan_says_what_a_race_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "MOST_CUTS", 1)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of().to_yaml())
    assert main(["plan", str(file), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "race    stage deep, before the run begins: 6 steps each on 3 of 3 folds, about " in printed
    assert "(head " in printed


def test_a_solved_head_has_no_depth_to_choose() -> None:
    with pytest.raises(UserError, match="works out the head alone, and unfreeze is auto"):
        made_recipe(stages=[RIDGE | {"unfreeze": "auto"}])
