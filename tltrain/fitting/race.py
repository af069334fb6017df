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
from tltrain.runs.folds.pooled import pool
from tltrain.runs.record import read_predictions
from tltrain.training.depths.judge import HEAD, Raced, choose_depth
from tltrain.training.run import train


def race(
    folder: Path,
    recipes: Sequence[tuple[Depth, Recipe]],
    by_head: Mapping[str, float] | None,
    groups: Mapping[str, int],
    start: RunFlags,
    console: Console,
) -> Raced | None:
    """Train the recipe of each depth on folds, and choose the shallowest that the best cannot be told from.

    recipes: of each depth, shallow first. by_head: image to whether the solved head gets it right, by a head that never saw it. None: the
    head is among the recipes. groups: image to its group, where those of a group are alike. Returns None if a signal stopped it. What is
    finished is not trained again.
    """
    right: dict[str, dict[str, float]] = {}
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


def _folded(folder: Path, recipe: Recipe, num: int, start: RunFlags) -> tuple[str, dict[str, float] | None]:
    """Train on the first fold, or on all. Returns the outcome, and image to whether a network that never saw it was right."""
    if num == FOLDS:
        wanted = FoldsFolder(folder, FOLDS, 1)
        outcome = run_folds(wanted, [(recipe.override(change), replace(start, folder=folder)) for change in changes(FOLDS, 1)], None)
        pooled = pool(folder) if outcome == "finished" else None
        if pooled is None:
            return outcome, None
        return outcome, dict(zip(pooled.predictions.ids, pooled.predictions.right.tolist(), strict=True))
    one = FoldsFolder(folder, FOLDS, 1).members[0].path
    outcome = str(train(recipe.override(changes(FOLDS, 1)[0]), replace(start, folder=one))["outcome"])
    found = read_predictions(one) if outcome == "finished" else None
    return outcome, None if found is None else found.right_by_id


def against_head(
    right: Mapping[str, Mapping[str, float]], by_head: Mapping[str, float] | None, groups: Mapping[str, int] | None = None
) -> Raced:
    """Choose between the solved head and deeper depths, on the images that all of them predicted.

    right: depth (shallow first) to image to 1.0 where it is right, else 0.0. by_head: the same for the head. None: it is in `right`.
    groups: as of `choose_depth`.
    """
    if not set(right) - {HEAD}:
        return Raced(HEAD, {}, "every deeper training failed: the head alone is kept")
    return choose_depth(right if by_head is None else {HEAD: by_head, **right}, groups)
