"""The race of depths: each is trained on folds, and paired with the solved head image by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.fitting.choose import FOLDS, shallowest
from tltrain.many.folds import run_folds
from tltrain.runs.folds.folder import FoldsFolder, changes
from tltrain.runs.folds.pooled import pool
from tltrain.runs.report.formatting import percent
from tltrain.runs.report.stats import bootstrap, gain

HEAD = "head"


@dataclass(frozen=True)
class Raced:
    """Who won, and what to say of it."""

    chosen: str
    accuracy: Mapping[str, float]
    sentence: str


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
    return judged(right, set(right_by_head))


def judged(right: Mapping[str, Mapping[str, float]], right_by_head: set[str]) -> Raced:
    """right: name of a depth, shallow first, to image to whether it is right. Images that not all depths predicted are left out."""
    if not right:
        return Raced(HEAD, {}, "every deeper training failed: the head alone is kept")
    ids = sorted(set.intersection(*(set(each) for each in right.values())))
    answers = {HEAD: np.array([float(name in right_by_head) for name in ids])}
    answers |= {name: np.array([each[i] for i in ids]) for name, each in right.items()}
    order, accuracy = list(answers), {name: float(answer.mean()) for name, answer in answers.items()}
    best = max(order, key=lambda name: (accuracy[name], -order.index(name)))
    low = {name: 0.0 if name == best else bootstrap(gain, answers[name], answers[best])[0] for name in order}
    chosen = shallowest(order, accuracy, low)
    return Raced(chosen, accuracy, _sentence(order, accuracy, best, chosen, len(ids)))


def _sentence(order: list[str], accuracy: Mapping[str, float], best: str, chosen: str, num: int) -> str:
    each = ", ".join(f"{name} {percent(accuracy[name])}" for name in order)
    told = f"race on {num:,} images, each judged by a network that never saw it: {each}"
    if chosen == HEAD:
        pays = "training deeper does not pay here" if best == HEAD else "training deeper pays no more than luck would"
        return f"{told}; {pays}: the head alone"
    others = "" if chosen == best else f", which {best} leads by no more than luck would"
    return f"{told}; chosen: {chosen}{others}"
