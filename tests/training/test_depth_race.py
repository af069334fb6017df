"""`unfreeze: auto`: which depths are tried, on which images, and that a stop in the race changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL, made_recipe
from safetensors.torch import load_file

import tltrain
from launcher.cli import main as launch
from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import open_images
from tltrain.fitting.lr_range import range_recipe
from tltrain.runs import run_dir
from tltrain.runs.listing.folders import find
from tltrain.runs.record import read_race, write_race
from tltrain.training.depths import race
from tltrain.training.depths.hidden import without_test
from tltrain.training.depths.judge import choose_depth
from tltrain.training.depths.race import candidates, raced_recipes, settled
from tltrain.training.run import train

RIDGE = {"name": "head", "unfreeze": "head", "solve": "ridge", "carry": "last"}
DEEP = ALL | {"name": "deep", "unfreeze": "auto", "steps": 6, "views": 2, "carry": "last"}


def recipe_of(**changes: Any) -> Recipe:
    return made_recipe(**{"stages": [RIDGE, DEEP]} | changes)


def kept(recipe: Recipe, folder: Path) -> str:
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return str(folder / "recipe.yaml")


class Trained:
    """A `train` that takes no time: the network is right about the images of its fold if its depth is the best, else about every other."""

    def __init__(self, best: str, refused: tuple[str, ...] = (), signal_after: int | None = None) -> None:
        self.best, self.refused, self.signal_after = best, refused, signal_after
        self.flags: list[RunFlags] = []

    def __call__(self, recipe: Recipe, start: RunFlags) -> dict[str, Any]:
        depth = recipe.stages[1].unfreeze
        if depth.startswith(self.refused):
            raise UserError(f"{depth} is refused")
        assert start.folder is not None
        self.flags.append(start)
        run_dir.create(start.folder, recipe)
        tested = open_images(recipe.data).test
        assert tested is not None
        rows = [f"{name},a,{'a' if i % 2 or depth == self.best else 'b'},1.0" for i, name in enumerate(tested.ids)]
        run_dir.predictions_file(start.folder).write_text("\n".join(["id,label,predicted,confidence", *rows]))
        if len(self.flags) == self.signal_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"outcome": "finished"}


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


KILLED = """
import os, signal, sys
from pathlib import Path
from tltrain.core import recipe as recipes
from tltrain.core.flags import RunFlags
from tltrain.training.depths import race
from tltrain.training.run import train
race.MOST_CUTS, race.LEAST_STEPS = 1, 2
def killed(raced, flags):
    is_second = raced.data.fold == 1 and raced.stages[1].unfreeze == "layer4.0"
    return train(raced, flags, lambda stage, step: os.kill(os.getpid(), signal.SIGKILL) if is_second and stage else None)
path = Path(sys.argv[1])
race.settled(recipes.parse(path.read_text(), "test"), RunFlags(folder=path.parent / "run", workers=0), killed)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("_short")
def test_a_race_that_is_killed_and_stopped_goes_on_to_the_same_end_and_is_run_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, start = recipe_of(), RunFlags(folder=tmp_path / "run", workers=0)
    killed = subprocess.run([sys.executable, "-c", KILLED, kept(recipe, tmp_path)], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run").exists()

    def stopping(raced: Recipe, flags: RunFlags) -> dict[str, Any]:
        is_second = raced.data.fold == 1 and raced.stages[1].unfreeze == "all"
        return train(raced, flags, lambda stage, step: os.kill(os.getpid(), signal.SIGTERM) if is_second and stage else None)

    ended = settled(recipe, start, stopping)
    assert isinstance(ended, dict)
    assert ended["outcome"] == "stopped"
    assert not (tmp_path / "run").exists()
    assert train(recipe, start)["outcome"] == "finished"
    assert "race on " in capsys.readouterr().out
    assert run_dir.read_recipe(tmp_path / "run").stages[1].unfreeze in ("head", "layer4.0", "all")
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
    with pytest.raises(UserError, match="raced by one process"):
        launch(["local", "--processes", "2", "--accelerate", "cpu", "--", "train", kept(recipe, tmp_path), "--folder", str(start.folder)])
    assert not (tmp_path / "run").exists()
    chosen = recipe.override({"stages.1.unfreeze": "layer4.0"})
    run_dir.create(tmp_path / "run", chosen)
    write_race(tmp_path / "run", {"deep": "layer4.0 won"})
    assert settled(recipe, start, train) == chosen


def test_a_folder_that_a_launcher_made_is_raced_for_once(tmp_path: Path) -> None:
    recipe, start, trained = recipe_of(), RunFlags(folder=tmp_path / "run", workers=0, trackers=("tensorboard",)), Trained("layer4.0")
    run_dir.create(tmp_path / "run", recipe)
    found = settled(recipe, start, trained)
    assert isinstance(found, Recipe)
    assert found.stages[1].unfreeze == "layer4.0"
    assert run_dir.read_recipe(tmp_path / "run") == found
    assert all(flags.trackers == () for flags in trained.flags), "no tracker fills with the races"
    num = len(trained.flags)
    assert settled(recipe, start, trained) == found
    assert len(trained.flags) == num
    assert [path for path, _ in find(tmp_path)] == [tmp_path / "run"], "the trainings of a race are no runs of the user's"
    assert len(list(find(tmp_path / "run-race"))) == num, "but where one asks for them"


def test_a_depth_that_somebody_named_was_not_raced(tmp_path: Path) -> None:
    recipe = recipe_of()
    run_dir.create(tmp_path / "run", recipe.override({"stages.1.unfreeze": "head"}))
    with pytest.raises(UserError, match=r"stages\.1\.unfreeze: head -> auto"):
        settled(recipe, RunFlags(folder=tmp_path / "run"), Trained("all"))


def test_what_fails_is_out_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = settled(recipe_of(), RunFlags(folder=tmp_path / "run"), Trained("all", refused=("head", "all")))
    assert isinstance(found, Recipe)
    assert found.stages[1].unfreeze not in ("head", "all")
    assert "head failed, and is out: head is refused" in capsys.readouterr().out
    with pytest.raises(UserError, match="every depth of stage deep failed, so that none can be chosen; the last: all is refused"):
        settled(recipe_of(), RunFlags(folder=tmp_path / "other"), Trained("all", refused=("head", "all", "layer")))


def test_a_signal_between_two_trainings_of_a_race_is_heard(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_dir.create(run, recipe_of())  # as a launcher does, which then looks for the outcome
    trained = Trained("all", signal_after=2)
    outcome = settled(recipe_of(), RunFlags(folder=run), trained)
    assert isinstance(outcome, dict)
    assert (outcome["outcome"], outcome["signal"]) == ("stopped", "SIGTERM")
    assert len(trained.flags) == 2
    assert run_dir.outcome(run)["outcome"] == "stopped"
    assert isinstance(settled(recipe_of(), RunFlags(folder=run), Trained("all")), Recipe)


def test_weights_that_know_the_folds_are_refused(tmp_path: Path, finished_run: Path) -> None:
    trained = Trained("all")
    recipe = recipe_of(backbone={"weights": str(finished_run)}, data=run_dir.read_recipe(finished_run).data.model_dump(mode="json"))
    with pytest.raises(UserError, match=r"a run that has learned from .* or name the depth in place of unfreeze: auto"):
        settled(recipe, RunFlags(folder=tmp_path / "run"), trained)
    assert not trained.flags


def test_a_folder_without_a_name_and_a_smoke_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trained = Trained("all")
    assert isinstance(settled(recipe_of(), RunFlags(folder=Path(), smoke=True), trained), Recipe)
    places = [flags.folder for flags in trained.flags]
    assert places == [tmp_path / "here-race" / "deep" / name / "fold-0" for name in ("head", "all")]


def test_python_says_that_a_race_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tltrain.api.training.train_run", lambda recipe, start: settled(recipe, start, Trained("all", signal_after=1)))
    with pytest.raises(UserError, match="stopped before the run began; the same call goes on"):
        tltrain.train(recipe_of(), folder=tmp_path / "run")


def test_images_of_a_group_count_as_one() -> None:
    ids = [f"{i}.png" for i in range(200)]
    head = {name: float(i >= 30) for i, name in enumerate(ids)}
    deep = dict.fromkeys(ids, 1.0)
    assert choose_depth({"head": head, "all": deep}).chosen == "all"
    assert choose_depth({"head": head, "all": deep}, {name: i // 30 for i, name in enumerate(ids)}).chosen == "head", "one group of seven"
    assert choose_depth({"head": head, "all": deep}, {name: i for i, name in enumerate(ids)}).chosen == "all"


def test_the_plan_says_what_a_race_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "MOST_CUTS", 1)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of().to_yaml())
    assert main(["plan", str(file), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "race    stage deep, before the run begins: 6 steps each on 3 of 3 folds, about " in printed
    assert "(head " in printed
    run_dir.create(tmp_path / "run", recipe_of().override({"stages.1.unfreeze": "layer4.0"}))
    write_race(tmp_path / "run", {"deep": "layer4.0 won"})
    assert main(["plan", str(file), "--workers", "0", "--folder", str(tmp_path / "run")]) == 0
    assert "race    " not in capsys.readouterr().out


def test_a_range_test_wants_a_named_depth() -> None:
    with pytest.raises(UserError, match="stage deep has unfreeze: auto, and a race at a rising rate"):
        range_recipe(recipe_of(), None, 50, 1.0)
    named = recipe_of(stages=[RIDGE, DEEP | {"name": "named", "unfreeze": "all"}, DEEP])
    assert range_recipe(named, "named", 50, 1.0).stages[1].schedule == "range"


def test_a_solved_head_has_no_depth_to_choose() -> None:
    with pytest.raises(UserError, match="works out the head alone, and unfreeze is auto"):
        made_recipe(stages=[RIDGE | {"unfreeze": "auto"}])
