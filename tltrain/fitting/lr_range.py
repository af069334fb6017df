"""`tltrain lr`: the learning-rate range test (Smith 2017). It is a run like any other, so that it holds for every strategy.

In one stage the learning rate rises by the same factor each step. Where the loss falls fastest, the rate is good; where it is lowest,
the rate is too high already.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib import rc_context

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags, is_first_process, run_path
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import AUTO
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.pages.figures import STYLE, new_figure, saved
from tltrain.training.run import train

SMOOTH = 0.9
"""Decay of the running mean of the loss."""
EXPLODED = 4.0
"""The curve is cut where the loss exceeds this multiple of its minimum."""
LEAST_STEPS = 20


@dataclass(frozen=True)
class Found:
    """Result of a range test."""

    lr: np.ndarray
    """(S,) of each step, up to where the loss exploded."""
    loss: np.ndarray
    """(S,) smoothed."""
    steepest: float | None
    """The rate at which the loss fell fastest by each factor. None: it never fell."""
    lowest: float
    """The rate at which the loss was lowest."""

    @property
    def suggested(self) -> float | None:
        """The steepest, but at most a tenth of the lowest, rounded to one digit."""
        return None if self.steepest is None else float(f"{min(self.steepest, self.lowest / 10):.0e}")


def look(recipe: Recipe, start: RunFlags, stage: str | None, steps: int, highest: float) -> str:
    """Run the test and say what it found. Returns finished, stopped or failed. Raises UserError."""
    rising = range_recipe(recipe, stage, steps, highest)
    path = start.folder or run_path(recipe, start).with_name(f"{run_path(recipe, start).name}-lr")
    outcome, found = measured(rising, replace(start, folder=path))
    if found is None:
        return outcome
    name, is_main = rising.stages[-1].name, is_first_process()
    console = Console(enabled=is_main)
    if is_main:
        _write(path, name, found)
    said = f"stage {name}: loss falls fastest at {found.steepest:.1e}, and is lowest at {found.lowest:.1e}" if found.steepest else ""
    console.say(said or f"stage {name}: the loss never fell; look at the data, or at the stages before it", style="bold")
    if found.suggested is not None:
        console.say(f"try     --stages.{name}.lr {found.suggested:g}")
    console.say(f"page    {path / 'lr.svg'}")
    return "finished"  # that the loss explodes at the end is what it is for


def measured(rising: Recipe, start: RunFlags) -> tuple[str, Found | None]:
    """Train a recipe of `range_recipe` into the folder that the flags name. Returns the outcome, and what its last stage says. None where
    a signal stopped it, or where it took too few steps to say anything."""
    assert start.folder is not None
    outcome = str(train(rising, start)["outcome"])
    name = rising.stages[-1].name
    rows = [row for row in read_rows(start.folder) if row["kind"] == "train" and row["stage"] == name] if start.folder.is_dir() else []
    if outcome == "stopped" or len(rows) < LEAST_STEPS:
        return outcome, None
    return outcome, find_rate([float(row["lr"]) for row in rows], [float(row["loss"]) for row in rows])


def range_recipe(recipe: Recipe, stage: str | None, steps: int, highest: float) -> Recipe:
    """The recipe up to the stage, in which the learning rate rises. Raises UserError."""
    names = [each.name for each in recipe.stages]
    if stage is not None and stage not in names:
        raise UserError(f"--stage is {stage}, and the stages of {recipe.name} are {', '.join(names)}")
    if steps < LEAST_STEPS:
        raise UserError(f"--steps is {steps}; fewer than {LEAST_STEPS} say nothing")
    if not (math.isfinite(highest) and highest > 0):
        raise UserError(f"--highest is {highest:g}; it must be above 0")
    at = len(names) - 1 if stage is None else names.index(stage)
    if recipe.stages[at].solve is not None:
        raise UserError(f"stage {names[at]} is solved, and has no learning rate; name another with --stage")
    if (still_open := next((each.name for each in recipe.stages[: at + 1] if each.unfreeze == AUTO), None)) is not None:
        raise UserError(
            f"stage {still_open} has unfreeze: auto, and a race at a rising rate would choose no depth; name one, such as "
            f"--stages.{still_open}.unfreeze all, the deepest that it may become"
        )
    rising = {"schedule": "range", "steps": steps, "epochs": None, "lr": highest, "warmup": 0, "patience": None, "carry": "last",
              "ema": None, "eval_epochs": 1e9}  # fmt: skip
    stages = [each.model_dump(mode="json") for each in recipe.stages[: at + 1]]
    stages[at] |= rising
    return recipe.override({"stages": stages, "name": f"{recipe.name}-lr"})


def find_rate(lr: Sequence[float], loss: Sequence[float]) -> Found:
    """Read the range test's curve. lr, loss: (S,) of each step. The loss may end in values that are not finite."""
    smooth: list[float] = []
    mean = 0.0
    for step, value in enumerate(loss):
        if not math.isfinite(value):
            break
        mean = SMOOTH * mean + (1 - SMOOTH) * value
        smooth.append(mean / (1 - SMOOTH ** (step + 1)))
        if value > EXPLODED * min(smooth):
            break
    loss_S, lr_S = np.array(smooth), np.array(lr[: len(smooth)])
    if len(loss_S) < 2:
        return Found(lr_S, loss_S, None, float(lr[0]))
    lowest = int(loss_S.argmin())
    slope_S = np.gradient(loss_S, np.log(lr_S))
    steepest = int(slope_S[: lowest + 1].argmin())
    falls = slope_S[steepest] < 0 and loss_S[lowest] < 0.98 * loss_S[0]
    return Found(lr_S, loss_S, float(lr_S[steepest]) if falls else None, float(lr_S[lowest]))


def _write(path: Path, stage: str, found: Found) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["lr", "smoothed_loss"], *zip(found.lr.tolist(), found.loss.tolist(), strict=True)])
    files.write_atomic(path / "lr.csv", text.getvalue())
    with rc_context(STYLE):
        figure, axes = new_figure()
        axes.plot(found.lr, found.loss, color="#0b66a8")
        axes.set_xscale("log")
        for value, word in ((found.steepest, "steepest"), (found.lowest, "lowest")):
            if value is not None:
                axes.axvline(value, color="#c8560b", linewidth=0.8, linestyle="--")
                axes.text(value, 1.0, f" {word}", transform=axes.get_xaxis_transform(), va="top", fontsize=7)
        axes.set_xlabel(f"learning rate of the head, stage {stage}")
        axes.set_ylabel("loss, smoothed")
        files.write_atomic(path / "lr.svg", saved(figure, "svg"))
