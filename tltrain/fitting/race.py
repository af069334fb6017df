"""The race of depths: each is trained on folds, and paired with the solved head image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.fitting.choose import FOLDS, Depth
from tltrain.many.folds import run_folds
from tltrain.runs.folds.folder import FoldsFolder, changes
from tltrain.training.depths.judge import HEAD, Answers, Raced, answers_of, choose_depth
from tltrain.training.run import train


def race(
    folder: Path,
    recipes: Sequence[tuple[Depth, Recipe]],
    by_head: Answers | None,
    groups: Mapping[str, int],
    start: RunFlags,
    console: Console,
) -> Raced | None:
    """Train the recipe of each depth on folds, and choose the shallowest that the best cannot be told from.

    recipes: of each depth, shallow first. by_head: the answers of solved heads to images that they never saw. None: the
    head is among the recipes. groups: image to its group, where those of a group are alike. Returns None if a signal stopped it. What is
    finished is not trained again.
    """
    right: dict[str, Answers] = {}
    for depth, recipe in recipes:
        console.say(f"race    {depth.name}: {depth.folds} of {FOLDS} folds", style="bold")
        outcome, answers = _folded(folder / depth.name, recipe, depth.folds, start)
        if outcome == "stopped":
            return None
        if answers is None:  # it failed, such as by a loss that is not finite: the other depths are still there
            console.say(f"race    {depth.name} {outcome}, and is out", style="yellow")
            continue
        right[depth.name] = answers
    return against_head(right, by_head, groups)


def _folded(folder: Path, recipe: Recipe, num: int, start: RunFlags) -> tuple[str, Answers | None]:
    """Train on the first fold, or on all. Returns the outcome, and the answers of networks to images that they never saw."""
    if num == FOLDS:
        wanted = FoldsFolder(folder, FOLDS, 1)
        outcome = run_folds(wanted, [(recipe.override(change), replace(start, folder=folder)) for change in changes(FOLDS, 1)], None)
        return outcome, answers_of([member.path for member in wanted.members]) if outcome == "finished" else None
    one = FoldsFolder(folder, FOLDS, 1).members[0].path
    outcome = str(train(recipe.override(changes(FOLDS, 1)[0]), replace(start, folder=one))["outcome"])
    return outcome, answers_of([one]) if outcome == "finished" else None


def against_head(right: Mapping[str, Answers], by_head: Answers | None, groups: Mapping[str, int] | None = None) -> Raced:
    """Choose between the solved head and deeper depths, on the images that all of them predicted.

    right: depth (shallow first) to its answers. by_head: those of the head. None: it is in `right`.
    groups: as of `choose_depth`.
    """
    if not set(right) - {HEAD}:
        return Raced(HEAD, {}, "every deeper training failed: the head alone is kept")
    return choose_depth(right if by_head is None else {HEAD: by_head, **right}, groups)
