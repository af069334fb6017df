"""Finds run folders: the one that --folder auto means, and all of them below a folder."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags, run_path
from tltrain.core.paths import run_of_a_fit
from tltrain.core.recipe import Recipe
from tltrain.runs import run_dir

AUTO = Path("auto")
"""The value of --folder that takes runs/NAME, or the first of runs/NAME-2, runs/NAME-3, ... that is free."""
MOST_DEPTH = 4
"""Levels below a folder at which runs are looked for: runs/NAME-sweep/rung-0/seed-1 is three below runs."""
OF_A_RACE = "of-a-race.txt"
"""In a folder of trainings that chose a depth: they are no runs of the user's, so that they are found only where one asks for them."""
_TRACES = ("generations", "checkpoints", "outcome.json", "test_metrics.json")
"""Names in a folder that a run has left there, whatever became of its recipe."""


def run_folder(recipe: Recipe, start: RunFlags) -> Path:
    """The run folder of a recipe: --folder, else runs/NAME.

    For --folder auto the first of runs/NAME, runs/NAME-2, ... that is free or holds a run of this very recipe: the same command goes on
    with its own run.
    """
    if start.folder != AUTO:
        return run_path(recipe, start)
    first = run_path(recipe, replace(start, folder=None))
    numbered = (first.with_name(f"{first.name}-{n}") for n in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if _may_take(path, recipe))


def check_recipe(path: Path, recipe: Recipe, start: RunFlags) -> None:
    """As `run_dir.check_recipe`, and where the default folder is another run's, say which one --folder auto would take."""
    try:
        run_dir.check_recipe(path, recipe)
    except UserError as error:
        own = run_path(recipe, replace(start, folder=None))
        if path.absolute() != own.absolute():
            raise
        free = run_folder(recipe, replace(start, folder=AUTO))
        raise UserError(f"{error}; --folder auto takes {free}") from None


def _may_take(path: Path, recipe: Recipe) -> bool:
    try:
        run_dir.check_recipe(path, recipe)
    except UserError:
        return False
    return True


def find(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Run folders at and below `root`, each with None, or with why it cannot be one although a run has left traces there.

    Nothing is looked for inside of a run folder, nor inside of a race of depths below `root`.
    """
    yield from _find(root, MOST_DEPTH)


def _find(path: Path, depth: int) -> Iterator[tuple[Path, str | None]]:
    try:
        if run_dir.recipe_file(path).is_file():
            yield (path if run_of_a_fit(path) is None else path / "run"), None
            return
        inside = sorted(path.iterdir())
    except OSError as error:
        yield path, f"it cannot be read: {error.strerror}"
        return
    if {each.name for each in inside} & set(_TRACES):
        yield path, f"it has no {run_dir.recipe_file(path).name}"
        return
    if depth < MOST_DEPTH and (path / OF_A_RACE).is_file():
        return
    if depth > 0:
        for each in inside:
            if not each.name.startswith(".") and each.is_dir():
                yield from _find(each, depth - 1)
