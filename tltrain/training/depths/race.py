"""`unfreeze: auto`: before a run begins, depths are tried for a short, equal budget, and the choice is written into its recipe."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, cast

from tltrain.core import files
from tltrain.core.errors import MachineError, StoppedAtOnce, UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console, one_plan
from tltrain.core.recipe import Recipe, Stage
from tltrain.core.stage_plan import AUTO, check_one_races, is_open
from tltrain.data import DataSplits, open_images
from tltrain.distributed.signals import StopSignal
from tltrain.models import factory
from tltrain.runs import run_dir
from tltrain.runs.early_end import stop_early
from tltrain.runs.listing.folders import OF_A_RACE, check_recipe, run_folder
from tltrain.runs.record import as_chosen, write_race
from tltrain.training.depths.hidden import check_weights, without_test
from tltrain.training.depths.judge import HEAD, Answers, answers_of, choose_depth

Train = Callable[..., dict[str, Any]]
FOLDS = 3
ENOUGH = 3_000
"""Training images from which one fold is enough to judge by: it holds a third of them."""
MOST_CUTS = 4
LEAST_STEPS, SHARE = 100, 0.25
"""Steps of each candidate: this share of the stage's own, and as many at least, but never more than the stage has."""
NOTE = "`unfreeze: auto` of the run {name} trained these; `tltrain ls` leaves them out, and nothing needs them once that run has begun\n"


def racing_first(train: Train) -> Train:
    """A `train` that settles the depths of a recipe first. A race that a signal stopped is its outcome."""

    @wraps(train)
    def after_the_race(recipe: Recipe, start: RunFlags, *more: Any, **named: Any) -> dict[str, Any]:
        if not is_open(recipe):
            return train(recipe, start, *more, **named)
        found = settled(recipe, start, train)
        return train(found, start, *more, **named) if isinstance(found, Recipe) else found

    return cast(Train, after_the_race)


def settled(recipe: Recipe, start: RunFlags, train: Train) -> Recipe | dict[str, Any]:
    """The recipe with a block in place of each `auto`: that of the run if it has begun, else by a race. Otherwise the outcome of the
    training that ended the race.

    The depths are written into the run folder as soon as all are settled, so that a later start does not race again. What was trained for
    the race lies beside it, in NAME-race: an interrupted race goes on from there. Raises UserError.
    """
    path = run_folder(recipe, start)
    check_recipe(path, recipe, start)
    known = as_chosen(recipe, path)
    if not is_open(known):
        return known
    check_one_races(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    with StopSignal().listening() as stop, one_plan():
        raced = _race_all(recipe, path, start, train, stop)
        if isinstance(raced, Recipe) and stop.signal is None:
            return raced
    ended = raced if isinstance(raced, dict) else _stopped(stop)
    if run_dir.recipe_file(path).is_file():  # a launcher looks there for the outcome
        stop_early(path, recipe, start, StoppedAtOnce(str(ended.get("signal"))))
    return ended


def _race_all(recipe: Recipe, path: Path, start: RunFlags, train: Train, stop: StopSignal) -> Recipe | dict[str, Any]:
    """The recipe with all depths, after they were written into the run folder, or the outcome of the training that ended the race."""
    images, told = open_images(recipe.data), dict[str, str]()
    check_weights(recipe, images, "begin with weights that have not seen them, or name the depth in place of unfreeze: auto")
    whole = Path(os.path.abspath(path))  # `.` has no name
    folder = whole.with_name(f"{whole.name}-race")
    for index, stage in enumerate(recipe.stages):
        if stage.unfreeze == AUTO:
            raced = _race(recipe, index, images, folder, start, train, stop)
            if isinstance(raced, dict):
                return raced
            chosen, told[stage.name] = raced
            recipe = recipe.override({f"stages.{index}.unfreeze": chosen})
    run_dir.create(path, recipe)
    write_race(path, told)  # first: a depth in the recipe that no race names counts as somebody's own
    files.write_atomic(run_dir.recipe_file(path), recipe.to_yaml())  # a launcher has made the folder with `auto` in it
    return recipe


def _race(
    recipe: Recipe, index: int, images: DataSplits, folder: Path, start: RunFlags, train: Train, stop: StopSignal
) -> tuple[str, str] | dict[str, Any]:
    """(the depth of stage `index`, what to say of the race), or the outcome of a training that was stopped."""
    stage, console = recipe.stages[index], Console(enabled=True)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / OF_A_RACE, NOTE.format(name=folder.name.removesuffix("-race")))
    tried = raced_recipes(recipe, index, images, without_test(recipe.data, folder / "test_images.csv"), start.smoke)
    answers: dict[str, Answers] = {}
    why = "its loss was not finite; lower its lr"
    for name, runs in tried.items():
        console.say(f"race    stage {stage.name}, {name}: {len(runs)} of {FOLDS} folds", style="bold")
        places = [folder / stage.name / name / f"fold-{fold}" for fold in range(len(runs))]
        for place in places:
            run_dir.check_owner(place, start.take_over, start.stale_seconds)  # another race of this run ends this one, no depth of it
        try:
            outcome = _trained(runs, places, start, train, stop)
        except MachineError:
            raise
        except UserError as error:
            outcome = {"outcome": "failed", "error": str(error)}
        if outcome.get("outcome") == "stopped":
            return outcome
        if outcome.get("outcome") == "finished":
            answers[name] = answers_of(places)
        else:
            why = str(outcome.get("error", why))
            console.say(f"race    {name} failed, and is out: {why}", style="yellow")
    if not answers:
        raise UserError(f"every depth of stage {stage.name} failed, so that none can be chosen; the last: {why}")
    found = choose_depth(answers, _groups(images))
    console.say(found.sentence, style="bold")
    return found.chosen, found.sentence


def _trained(runs: Sequence[Recipe], places: Sequence[Path], start: RunFlags, train: Train, stop: StopSignal) -> dict[str, Any]:
    """Train one after the other, until one does not finish. Returns the last outcome."""
    outcome: dict[str, Any] = {}
    quiet = replace(start, trackers=(), wandb="disabled", wandb_weights=False, compile=False)  # a minute of compiling would not pay
    for run, place in zip(runs, places, strict=True):
        if stop.signal is not None:
            return _stopped(stop)
        outcome = train(run, replace(quiet, folder=place))
        if outcome.get("outcome") != "finished":
            break
    return outcome


def _stopped(stop: StopSignal) -> dict[str, Any]:
    return {"outcome": "stopped", "signal": stop.signal, "stage": "", "step": 0}


def _groups(images: DataSplits) -> Mapping[str, int]:
    """Image to its group. Empty where the source has no groups."""
    source = images.source
    return {} if source is None else dict(zip(source.ids, source.groups.tolist(), strict=True))


def raced_recipes(recipe: Recipe, index: int, images: DataSplits, hidden: dict[str, Any], smoke: bool = False) -> dict[str, list[Recipe]]:
    """Each candidate, the shallowest first, and the recipes of its folds: the stages before, as they stand, and a short one of its depth.

    images: those of the recipe. hidden: what keeps the test images out, as `without_test` gives it. smoke: a test, of the shallowest and
        the deepest on one fold.
    """
    stage = recipe.stages[index]
    chain = factory.skeleton(recipe.backbone, len(images.classes), recipe.data.size, recipe.data.resize).chain
    steps = stage.steps or math.ceil((stage.epochs or 0) * len(images.train) / recipe.batch)
    short = {"steps": min(steps, max(LEAST_STEPS, round(SHARE * steps))), "epochs": None}
    num = 1 if smoke or len(images.train) >= ENOUGH else FOLDS
    before = [each.model_dump(mode="json") for each in recipe.stages[:index]]
    # Pictures without labels may be images of test, which is hidden here, so that nothing could keep them apart.
    alone = {} if recipe.distill is None else {"distill.unlabelled": None}
    raced: dict[str, list[Recipe]] = {}
    names = candidates([block.name for block in chain.blocks], stage)
    for name in (names[0], names[-1]) if smoke else names:
        stages = [*before, {**stage.model_dump(mode="json"), **short, "unfreeze": name}]
        changes = {**hidden, **alone, "stages": stages, "data.folds": FOLDS, "data.repeat": 0}
        raced[name] = [recipe.override({**changes, "data.fold": fold}) for fold in range(num)]
    return raced


def candidates(names: Sequence[str], stage: Stage) -> list[str]:
    """The depths that are tried, the shallowest first: the head, up to MOST_CUTS blocks that begin a group such as layer4.0, and all.

    names: of all blocks. A head always trains whole: where `trains` says otherwise it is no candidate.
    """
    begin = starts(names, 2)
    num = min(MOST_CUTS, len(begin))
    cuts = [names[begin[len(begin) - 1 - i * len(begin) // num]] for i in range(num)]
    return [*([HEAD] if stage.trains == "all" else []), *cuts, "all"]


def starts(names: Sequence[str], least: int) -> list[int]:
    """The blocks that begin a group, such as layer4.0, between the first block and the head; where fewer than `least` do, all of those."""
    inner = range(1, len(names) - 1)
    firsts = [i for i in inner if names[i].endswith(".0")]
    return firsts if len(firsts) >= least else list(inner)
