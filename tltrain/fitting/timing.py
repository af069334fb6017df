"""What a network and a recipe take on this machine, as measured before anything trains."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from tltrain.cache.measure import Machine, _Meter, timed
from tltrain.cache.planner import survey
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import DataSplits
from tltrain.models.families.common import is_convolutional
from tltrain.planning.compiling import forward_s
from tltrain.planning.run_time import run_time
from tltrain.training.depths.race import starts
from tltrain.training.experiment import Experiment
from tltrain.training.setup import num_workers

SHARES = (0.15, 0.4)
"""Shares of a network's time that its training part may take, from the shallowest cut on. The whole network is tried too."""
MOST_STARTS = 12
"""Blocks that are timed."""


@dataclass(frozen=True)
class Network:
    """What a recipe depends on."""

    device: str
    size: int
    """Side of its images, pixels."""
    num_features: int
    """That its head takes."""
    image_s: float
    """Seconds in which an image is read and passes through it."""
    cuts: tuple[str, ...]
    """Where its training could begin, from the shallowest to the deepest, which is `all`."""
    transformer: bool
    """Whether it is no network of convolutions, and wants a smaller learning rate."""


def machine_of(images: DataSplits, start: RunFlags) -> Machine:
    """This machine, as `tltrain plan` takes it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(device, "no", contextlib.nullcontext, num_workers(images, start, 1), 1)


def network_of(recipe: Recipe, images: DataSplits, start: RunFlags, with_cuts: bool = True) -> Network:
    """Time the network of a recipe, without its weights. with_cuts: find where its training could begin too. Raises UserError."""
    student, machine = Experiment.outline(recipe, images).student, machine_of(images, start)
    chain, side = timed(student.chain, machine.device), student.preprocess.size
    names = [block.name for block in chain.blocks]
    whole_s = forward_s(chain, None, side, machine)
    seconds = [_Meter(images, student, recipe, machine.device, machine.workers).image_s("none"), whole_s]
    cuts: list[str] = []
    if with_cuts and not chain.runs_whole:
        spent = {i: forward_s(chain, i, side, machine) for i in _timed_starts(names)}
        for share in SHARES:
            near = min(spent, key=lambda i: abs(1 - spent[i] / whole_s - share), default=None)
            if near is not None and names[near] not in cuts:
                cuts.append(names[near])
        cuts.sort(key=names.index, reverse=True)
    layers = [module for module in chain.net.modules() if isinstance(module, nn.Linear)]
    num_features = layers[-1].in_features if layers else 0
    image_s = sum(seconds) if machine.device.type == "cpu" else max(seconds)
    return Network(machine.device.type, side, num_features, image_s, (*cuts, "all"), not is_convolutional(chain.net))


def seconds_of(recipe: Recipe, images: DataSplits, start: RunFlags) -> float:
    """Estimated seconds of a run, as its plan would say."""
    experiment, machine = Experiment.outline(recipe, images), machine_of(images, start)
    choices = survey(recipe, start, images, experiment.student, None, experiment.plan, machine)
    expected = run_time(recipe, images, experiment.student, None, experiment.plan, machine, choices)
    return 0.0 if expected is None else expected.total


def _timed_starts(names: list[str]) -> list[int]:
    """The blocks that a group begins with, at most MOST_STARTS, always with the last; every block where there are few groups."""
    begin = starts(names, len(SHARES) + 1)
    return begin[:: -max(1, -(-len(begin) // MOST_STARTS))][::-1]
