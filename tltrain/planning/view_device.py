"""Chooses where strong views are made: by the data workers or on the training device.

The choice is by measurement on this machine. Both give the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tltrain.cache import image_cache
from tltrain.cache.measure import Machine, least_s, timed
from tltrain.cache.planner import Choices
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import Split
from tltrain.data.rendering import to_device
from tltrain.data.sampler import SampleRef
from tltrain.data.views import Views
from tltrain.models.factory import Loaded
from tltrain.planning.compiling import TRAINING, forward_s

COMPARED, TIMED, CALLS = 16, 64, 5
"""COMPARED: number of views made both ways, which must be equal. TIMED: number of views in the batch that times the device. CALLS: number
of calls that are timed, of which the fastest counts."""
LEAST_GAIN = 1.05
"""Minimum speed-up of a training step for which the device makes the views."""


@dataclass(frozen=True)
class ViewDevice:
    """Whether the device makes strong views, and why."""

    on_device: bool = False
    why: str = ""
    """The reason, as the plan shows it. Empty if there was no choice."""


@dataclass(frozen=True)
class Rates:
    """Seconds per image of each part of the input pipeline and of training."""

    host_s: float
    """All data workers together: make strong views."""
    base_s: float
    """All data workers together: hand over base images and the random parameters of their views."""
    render_s: float
    """The device: make views from base images."""
    network_s: float
    """The device: a training step."""

    @property
    def pays(self) -> bool:
        """Whether training is faster by more than LEAST_GAIN if the device makes the views.

        Workers and device run at the same time, so the slower of the two limits the throughput.
        """
        return max(self.host_s, self.network_s) > LEAST_GAIN * max(self.base_s, self.network_s + self.render_s)

    def line(self, num_workers: int) -> str:
        host, base, render, network = (f"{1 / max(s, 1e-9):,.0f}" for s in (self.host_s, self.base_s, self.render_s, self.network_s))
        workers = f"{num_workers} worker{'' if num_workers == 1 else 's'}" if num_workers else "this process"
        return f"{workers} can make {host} images/s, or hand over {base} for the device to make {render}; training takes about {network}"


def view_device(
    recipe: Recipe, start: RunFlags, split: Split, student: Loaded, planned: Sequence[StagePlan], machine: Machine, choices: Choices
) -> ViewDevice:
    """Decide for a run. split: its training images. Raises UserError if --views device would give other pixels than the host."""
    if start.views == "host" or not any(stage.spec.augment == "strong" for stage in planned):
        return ViewDevice()
    if start.views == "auto" and machine.device.type != "cuda":
        return ViewDevice()
    flip, seed = recipe.data.flip, recipe.data.seed
    erasing = max(stage.spec.erasing for stage in planned if stage.spec.augment == "strong")
    host, device = (Views(split, student.preprocess, "strong", flip, seed, None, on, erasing) for on in (False, True))
    chosen = sorted({i * len(split) // 4 for i in range(4)})
    try:
        samples = [SampleRef(i, 1 + v) for v in range(COMPARED // len(chosen)) for i in chosen]
        expected = host.batch(samples)
    except (UserError, IndexError):  # the data set does not exist yet
        return ViewDevice(start.views == "device")
    rendered = to_device(device.batch(samples), machine.device)["image"]
    if not torch.equal(rendered.cpu(), expected["image"]):
        problem = f"here the device makes other pixels than Pillow, by up to {_difference(rendered.cpu(), expected['image'])} grey levels"
        if start.views == "device":
            raise UserError(f"--views device, and {problem}; take --views host")
        return ViewDevice(why=f"on the host: {problem}")
    if start.views == "device":
        return ViewDevice(True, "on the device, as --views says")
    rates = _rates(host, device, chosen, student, machine, choices)
    return ViewDevice(rates.pays, f"on the {'device' if rates.pays else 'host'}: {rates.line(machine.workers)}")


def _rates(host: Views, device: Views, chosen: Sequence[int], student: Loaded, machine: Machine, choices: Choices) -> Rates:
    """Time each part. The base images of the chosen samples are in memory already, so the cost of decoding is added from an estimate."""
    at_once = max(1, machine.workers)
    stored = choices.images is not None and choices.images.place is not None
    read_s = 0.0 if stored or machine.workers == 0 else image_cache.estimate(host.split, host.preprocess).seconds / len(host.split)
    some = [SampleRef(i, 1 + v) for v in range(4) for i in chosen]
    host_s, base_s = (least_s(partial(views.batch, some), CALLS) / len(some) for views in (host, device))
    many = {name: _pinned(tensor, machine.device) for name, tensor in device.batch([some[n % len(some)] for n in range(TIMED)]).items()}
    render_s = least_s(lambda: _waited(to_device(many, machine.device)["image"]), CALLS) / TIMED
    network_s = TRAINING * forward_s(timed(student.chain, machine.device), None, student.preprocess.size, machine)
    return Rates((host_s + read_s) / at_once, (base_s + read_s) / at_once, render_s, network_s)


def _waited(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _difference(one: Tensor, other: Tensor) -> int:
    return int((one.int() - other.int()).abs().max())
