"""`tltrain plan` and `tltrain preview`: show the stages and the images of a recipe, without reading weights and without training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from tltrain.cache.measure import Machine
from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console, duration
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import AUTO, deepest
from tltrain.data import DataSplits, open_images, outline_images
from tltrain.data.sampler import num_micro
from tltrain.data.sources.folder import check_apart
from tltrain.data.unlabelled.pictures import apart, beside
from tltrain.fitting.timing import seconds_of
from tltrain.planning.ahead import look_ahead
from tltrain.runs.listing.folders import run_folder
from tltrain.runs.record import as_chosen
from tltrain.training import optim, plan_table
from tltrain.training.depths.race import FOLDS, raced_recipes
from tltrain.training.experiment import Experiment, check_objective
from tltrain.training.setup import DEVICE_BATCH, num_workers


def show_plan(recipe: Recipe, start: RunFlags, console: Console) -> None:
    """`tltrain plan`: print the table of stages, the caching planned for each, and notes on the data. Raises UserError."""
    check_apart(recipe.data.source, run_folder(recipe, start))
    recipe = as_chosen(recipe, run_folder(recipe, start))
    with console.doing(f"reading the images of {recipe.data.source}", log=False):
        images = outline_images(recipe.data)
        images = apart(images, beside(images, recipe, outline=True).unlabelled, recipe.data.source)
    for note in images.notes:
        console.say(f"data    {note}", style="yellow")
    for line in _races(recipe, images, start):
        console.say(line)
    recipe = deepest(recipe)
    experiment = Experiment.outline(recipe, images, lambda text: console.say(text, style="yellow"))
    student, planned = experiment.student, experiment.plan
    micro = num_micro(recipe.batch, 1, start.max_device_batch or DEVICE_BATCH)
    optim.check_norm_stats(student.chain, planned, student.preprocess.size, recipe.batch // micro)
    check_objective(recipe, images, recipe.batch // micro)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine(device, "no", contextlib.nullcontext, num_workers(images, start, 1), 1)
    with console.doing("timing this machine", log=False):
        ahead = look_ahead(recipe, start, images, student, experiment.teacher, planned, machine)
    about = "\n".join(filter(None, (plan_table.describe_data(images, student, ahead.views), ahead.lines)))
    console.show(plan_table.render(recipe, student.chain, planned, 1, micro, about, ahead.choices.lines(), len(images.classes)))


def _races(recipe: Recipe, images: DataSplits, start: RunFlags) -> Iterator[str]:
    """A line on each race of depths, and what it costs."""
    for index, stage in enumerate(recipe.stages):
        if stage.unfreeze == AUTO:
            tried = raced_recipes(deepest(recipe), index, images, {}, start.smoke)
            share = (FOLDS - 1) / FOLDS  # a fold trains on the others
            spent = {name: share * sum(seconds_of(run, images, start) for run in runs) for name, runs in tried.items()}
            runs = next(iter(tried.values()))
            each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent.items())
            told = f"{runs[0].stages[index].steps:,} steps each on {len(runs)} of {FOLDS} folds, about {duration(sum(spent.values()))}"
            yield f"race    stage {stage.name}, before the run begins: {told} ({each}); the plan shows it as deep as it may become"


def preview(recipe: Recipe, out: Path, rows: int = 8) -> Path:
    """`tltrain preview`: write an image of a recipe's training data as the network gets it, `rows` rows. Reads no weights.

    Returns the path of the file. Raises UserError.
    """
    if rows < 1:
        raise UserError(f"--rows is {rows}; it must be at least 1")
    recipe, images = deepest(recipe), open_images(recipe.data)
    from tltrain.planning.preview import picture  # matplotlib is slow to import, and `tltrain plan` does not need it

    experiment = Experiment.outline(recipe, images)
    drawn = picture(recipe, images, experiment.student.preprocess, experiment.plan, rows)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(out, drawn)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another place with --out") from error
    return out
