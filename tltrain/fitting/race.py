"""The race of depths: each is trained on folds, and paired with the solved head image by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.fitting.choose import FOLDS
from tltrain.many.folds import run_folds
from tltrain.runs.folds.folder import FoldsFolder, changes
from tltrain.runs.folds.pooled import pool
from tltrain.training.depths.judge import HEAD, Raced, judged


def race(folder: Path, recipes: Mapping[str, Recipe], right_by_head: tuple[str, ...], start: RunFlags, console: Console) -> Raced | None:
    """Train the recipe of each depth on FOLDS folds, and choose the shallowest that the best cannot be told from.

    recipes: name of a depth to its recipe, shallow first. right_by_head: the ids of the images that the solved head alone gets right.
    Returns None if a signal stopped it. What is finished is not trained again.
    """
    right: dict[str, dict[str, float]] = {}
    for name, recipe in recipes.items():
        console.say(f"race    {name}: {FOLDS} folds", style="bold")
        wanted = FoldsFolder(folder / name, FOLDS, 1)
        parsed = [(recipe.override(change), replace(start, folder=wanted.path)) for change in changes(FOLDS, 1)]
        outcome = run_folds(wanted, parsed, None)
        if outcome == "stopped":
            return None
        pooled = pool(wanted.path) if outcome == "finished" else None
        if pooled is None:  # it failed, such as by a loss that is not finite: the other depths are still there
            console.say(f"race    {name} {outcome}, and is out", style="yellow")
            continue
        right[name] = dict(zip(pooled.predictions.ids, pooled.predictions.right.tolist(), strict=True))
    return against_head(right, set(right_by_head))


def against_head(right: Mapping[str, Mapping[str, float]], right_by_head: set[str]) -> Raced:
    """Who wins among the solved head and deeper depths. right: name of a depth, shallow first, to image to whether it is right."""
    if not right:
        return Raced(HEAD, {}, "every deeper training failed: the head alone is kept")
    images = set.intersection(*(set(each) for each in right.values()))
    return judged({HEAD: {name: float(name in right_by_head) for name in images}, **right})
