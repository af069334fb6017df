"""Times a network and a recipe on this machine, before training."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tltrain.cache.measure import Machine, _Meter, timed
from tltrain.cache.planner import survey
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import DataSplits
from tltrain.models.chain import Chain
from tltrain.models.families.common import is_convolutional
from tltrain.planning.compiling import forward_s
from tltrain.planning.run_time import run_time
from tltrain.training.depths.race import starts
from tltrain.training.experiment import Experiment
from tltrain.training.setup import num_workers

SHARES = (0.15, 0.4)
"""Shares of a network's operations that its training part may take, from the shallowest cut on. The whole network is tried too. Counted,
not timed: the same cuts on every machine."""


@dataclass(frozen=True)
class Network:
    """A recipe's network, timed."""

    device: str
    size: int
    """Side of its images, pixels."""
    resize: int
    """Shorter side of an image before the crop, pixels."""
    num_features: int
    """Number of inputs of its head."""
    image_s: float
    """Seconds in which an image is read and passes through it."""
    cuts: tuple[str, ...]
    """Where its training could begin, from the shallowest to the deepest, which is `all`."""
    transformer: bool
    """Whether it is not convolutional. Such networks need a smaller learning rate."""


def machine_of(images: DataSplits, start: RunFlags) -> Machine:
    """This machine, as `tltrain plan` takes it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(device, "no", contextlib.nullcontext, num_workers(images, start, 1), 1)


def network_of(recipe: Recipe, images: DataSplits, start: RunFlags, with_cuts: bool = True) -> Network:
    """Time the network of a recipe, without its weights. with_cuts: say where its training could begin too. Raises UserError."""
    student, machine = Experiment.outline(recipe, images).student, machine_of(images, start)
    chain, side = timed(student.chain, machine.device), student.preprocess.size
    names = [block.name for block in chain.blocks]
    whole_s = forward_s(chain, None, side, machine)
    seconds = [_Meter(images, student, recipe, machine.device, machine.workers).image_s("none"), whole_s]
    cuts: list[str] = []
    if with_cuts and not chain.runs_whole:
        begin = starts(names, len(SHARES) + 1)
        frozen, whole = {i: _operations(chain, i, side) for i in begin}, max(1, _operations(chain, None, side))
        for share in SHARES:
            near = min(begin, key=lambda i: abs(1 - frozen[i] / whole - share), default=None)
            if near is not None and names[near] not in cuts:
                cuts.append(names[near])
        cuts.sort(key=names.index, reverse=True)
    layers = [module for module in chain.net.modules() if isinstance(module, nn.Linear)]
    num_features = layers[-1].in_features if layers else 0
    image_s = sum(seconds) if machine.device.type == "cpu" else max(seconds)
    return Network(
        machine.device.type, side, student.preprocess.resize, num_features, image_s, (*cuts, "all"), not is_convolutional(chain.net)
    )


def seconds_of(recipe: Recipe, images: DataSplits, start: RunFlags) -> float:
    """Estimated seconds of a run, as its plan would say."""
    experiment, machine = Experiment.outline(recipe, images), machine_of(images, start)
    choices = survey(recipe, start, images, experiment.student, None, experiment.plan, machine)
    expected = run_time(recipe, images, experiment.student, None, experiment.plan, machine, choices)
    return 0.0 if expected is None else expected.total


def _operations(chain: Chain, stop: int | None, side: int) -> int:
    """Floating-point operations of an image on its way to a block. None: through the whole network."""
    images = torch.zeros((1, 3, side, side), dtype=torch.uint8, device=next(chain.net.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        chain(images, stop=stop)
    return int(counter.get_total_flops())
