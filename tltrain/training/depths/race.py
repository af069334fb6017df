"""`unfreeze: auto`: before a run begins, depths are tried for a short, equal budget, and the choice is written into its recipe."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, cast

from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe, Stage
from tltrain.core.stage_plan import AUTO, as_kept
from tltrain.data import DataSplits, open_images
from tltrain.models import factory
from tltrain.runs import run_dir
from tltrain.runs.listing.folders import check_recipe, run_folder
from tltrain.runs.record import read_predictions, write_race
from tltrain.training.depths.hidden import without_test
from tltrain.training.depths.judge import HEAD, judged

Train = Callable[..., dict[str, Any]]
FOLDS = 3
ENOUGH = 3_000
"""Training images from which one fold is enough to judge by: it holds a third of them."""
MOST_CUTS = 4
LEAST_STEPS, SHARE = 100, 0.25
"""Steps of each candidate: this share of the stage's own, and as many at least, but never more than the stage has."""


def racing_first(train: Train) -> Train:
    """A `train` that settles the depths of a recipe first. A race that a signal stopped is its outcome."""

    @wraps(train)
    def after_the_race(recipe: Recipe, start: RunFlags, *more: Any, **named: Any) -> dict[str, Any]:
        if all(stage.unfreeze != AUTO for stage in recipe.stages):
            return train(recipe, start, *more, **named)
        found = settled(recipe, start, train)
        return train(found, start, *more, **named) if isinstance(found, Recipe) else found

    return cast(Train, after_the_race)


def settled(recipe: Recipe, start: RunFlags, train: Train) -> Recipe | dict[str, Any]:
    """The recipe with a block in place of each `auto`: that of the run if it has begun, else by a race. Otherwise the outcome of the
    training that ended the race.

    The run folder is made as soon as all is settled, so that a later start does not race again. What was trained for the race lies beside
    it, in NAME-race: an interrupted race goes on from there. Raises UserError.
    """
    path = run_folder(recipe, start)
    check_recipe(path, recipe, start)
    if run_dir.recipe_file(path).is_file():
        return as_kept(recipe, run_dir.read_recipe(path))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "unfreeze: auto is raced by one process, whose choice several then train with; start the same command once without the "
            "launcher, stop it when the race has ended (Ctrl-C), and go on with the launcher. Or name the depth"
        )
    told: dict[str, str] = {}
    for index, stage in enumerate(recipe.stages):
        if stage.unfreeze == AUTO:
            raced = _race(recipe, index, path.with_name(f"{path.name}-race"), start, train)
            if isinstance(raced, dict):
                return raced
            chosen, told[stage.name] = raced
            recipe = recipe.override({f"stages.{index}.unfreeze": chosen})
    run_dir.create(path, recipe)
    write_race(path, told)
    return recipe


def _race(recipe: Recipe, index: int, folder: Path, start: RunFlags, train: Train) -> tuple[str, str] | dict[str, Any]:
    """(the depth of stage `index`, what to say of the race), or the outcome of a training that was stopped."""
    stage, console = recipe.stages[index], Console(enabled=True)
    hidden = without_test(recipe.data, (folder / "test_images.csv").absolute())
    tried = raced_recipes(recipe, index, open_images(recipe.data), hidden)
    right: dict[str, dict[str, float]] = {}
    for name, runs in tried.items():
        console.say(f"race    stage {stage.name}, {name}: {len(runs)} of {FOLDS} folds", style="bold")
        places = [folder / stage.name / name / f"fold-{fold}" for fold in range(len(runs))]
        outcome = _trained(runs, places, start, train)
        if outcome.get("outcome") == "stopped":
            return outcome
        if outcome.get("outcome") == "finished":
            right[name] = _right(places)
        else:
            console.say(f"race    {name} failed, and is out", style="yellow")
    if not right:
        raise UserError(f"every depth of stage {stage.name} failed, so that none can be chosen; lower its lr")
    found = judged(right)
    console.say(found.sentence, style="bold")
    return found.chosen, found.sentence


def _trained(runs: Sequence[Recipe], places: Sequence[Path], start: RunFlags, train: Train) -> dict[str, Any]:
    """Train one after the other, until one does not finish. Returns the last outcome."""
    outcome: dict[str, Any] = {}
    for run, place in zip(runs, places, strict=True):
        outcome = train(run, replace(start, folder=place))
        if outcome.get("outcome") != "finished":
            break
    return outcome


def _right(places: Sequence[Path]) -> dict[str, float]:
    """Image to whether the network that had not seen it was right."""
    right: dict[str, float] = {}
    for place in places:
        found = read_predictions(place)
        assert found is not None, "a finished run on a fold has been tested"
        right |= {name: float(is_right) for (name, _), is_right in zip(found.samples, found.right.tolist(), strict=True)}
    return right


def raced_recipes(recipe: Recipe, index: int, images: DataSplits, hidden: dict[str, Any]) -> dict[str, list[Recipe]]:
    """Each candidate, the shallowest first, and the recipes of its folds: the stages before, as they stand, and a short one of its depth.

    images: those of the recipe. hidden: what keeps the test images out, as `without_test` gives it.
    """
    stage = recipe.stages[index]
    chain = factory.skeleton(recipe.backbone, len(images.classes), recipe.data.size, recipe.data.resize).chain
    steps = stage.steps or math.ceil((stage.epochs or 0) * len(images.train) / recipe.batch)
    short = {"steps": min(steps, max(LEAST_STEPS, round(SHARE * steps))), "epochs": None}
    num = 1 if len(images.train) >= ENOUGH else FOLDS
    before = [each.model_dump(mode="json") for each in recipe.stages[:index]]
    raced: dict[str, list[Recipe]] = {}
    for name in candidates([block.name for block in chain.blocks], stage):
        stages = [*before, {**stage.model_dump(mode="json"), **short, "unfreeze": name}]
        changes = {**hidden, "stages": stages, "data.folds": FOLDS, "data.repeat": 0}
        raced[name] = [recipe.override({**changes, "data.fold": fold}) for fold in range(num)]
    return raced


def candidates(names: Sequence[str], stage: Stage) -> list[str]:
    """The depths that are tried, the shallowest first: the head, up to MOST_CUTS blocks that begin a group such as layer4.0, and all.

    names: of all blocks. A head always trains whole: where `trains` says otherwise it is no candidate.
    """
    inner = list(names[1:-1])
    firsts = [name for name in inner if name.endswith(".0")]
    starts = firsts if len(firsts) > 1 else inner
    num = min(MOST_CUTS, len(starts))
    cuts = [starts[len(starts) - 1 - i * len(starts) // num] for i in range(num)]
    return [*([HEAD] if stage.trains == "all" else []), *cuts, "all"]
