"""Measurements and decisions before the first step: which outputs to store, where strong views are made, and the time of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tltrain.cache.measure import Machine
from tltrain.cache.planner import Choices, survey
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits
from tltrain.models.factory import Loaded
from tltrain.planning import compiling
from tltrain.planning.run_time import run_time
from tltrain.planning.view_device import ViewDevice, view_device


@dataclass(frozen=True)
class Ahead:
    """The decisions, and what they were taken from."""

    choices: Choices
    views: ViewDevice
    lines: str
    """Of the plan: whether --compile pays, and how long the run will take."""
    later: Mapping[str, float]
    """Seconds that are expected behind each stage, by its name. Empty where nothing can be measured."""


def look_ahead(
    recipe: Recipe, start: RunFlags, images: DataSplits, student: Loaded, teacher: Loaded | None, planned: Sequence[StagePlan],
    machine: Machine, world: int = 1,
) -> Ahead:  # fmt: skip
    """Measure and decide. None of it affects the trained weights. Raises UserError where --cache always or --views device cannot be."""
    choices = survey(recipe, start, images, student, teacher, planned, machine)
    views = view_device(recipe, start, images.train, student, planned, machine, choices)
    lines = [compiling.note(start, student, planned, machine, world)]
    expected = None
    with contextlib.suppress(torch.OutOfMemoryError):  # an estimate ends no run; where one image does not fit, training says so
        expected = run_time(recipe, images, student, teacher, planned, machine, choices, world)
    if expected is None:
        return Ahead(choices, views, lines[0], {})
    names = [stage.spec.name for stage in planned]
    later = {name: expected.after(i) for i, name in enumerate(names)}
    return Ahead(choices, views, "\n".join(filter(None, [*lines, expected.line(names)])), later)
