"""Where strong views are made: by the data workers, or on the device that trains. Measured on this machine; the pixels are the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tltrain.cache import image_cache
from tltrain.cache.frozen import FrozenModel
from tltrain.cache.measure import Machine, time_frozen, timed
from tltrain.cache.planner import CHUNK, Choices
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import Split
from tltrain.data.rendering import to_device
from tltrain.data.sampler import SampleRef
from tltrain.data.views import Views
from tltrain.models.factory import Loaded

COMPARED, TIMED = 16, 64
"""Views that are made both ways and must be equal; views that are made at once to time the device."""
LEAST_GAIN = 1.05
"""The device makes the views only where a stage becomes this much faster by it."""
TRAINING = 3
"""A training step takes about so many times its forward pass."""


@dataclass(frozen=True)
class ViewDevice:
    """Whether the device makes strong views, and why."""

    on_device: bool = False
    why: str = ""
    """For the plan; empty where there was nothing to choose."""


@dataclass(frozen=True)
class Rates:
    """Seconds an image."""

    host_s: float
    """All data workers together, strong views."""
    base_s: float
    """All data workers together, base images and what is drawn for them."""
    render_s: float
    """The device, views from base images."""
    network_s: float
    """The device, a training step."""

    @property
    def pays(self) -> bool:
        """Whether the workers are behind the network, and would be less so by leaving the pixels to the device."""
        return max(self.host_s, self.network_s) > LEAST_GAIN * max(self.base_s, self.network_s + self.render_s)

    def line(self, num_workers: int) -> str:
        host, base, render, network = (f"{1 / max(s, 1e-9):,.0f}" for s in (self.host_s, self.base_s, self.render_s, self.network_s))
        workers = f"{num_workers} worker{'' if num_workers == 1 else 's'}" if num_workers else "this process"
        return f"{workers} can make {host} images/s, or hand over {base} for the device to make {render}; training takes about {network}"


def view_device(
    recipe: Recipe, start: RunFlags, split: Split, student: Loaded, planned: Sequence[StagePlan], machine: Machine, choices: Choices
) -> ViewDevice:
    """Decide it for a run. split: its training images. Raises UserError where --views device cannot be had."""
    if start.views == "host" or not any(stage.spec.augment == "strong" for stage in planned):
        return ViewDevice()
    if start.views == "auto" and machine.device.type != "cuda":
        return ViewDevice()
    host, device = (Views(split, student.preprocess, "strong", recipe.data.flip, recipe.data.seed, on_device=on) for on in (False, True))
    chosen = sorted({i * len(split) // 4 for i in range(4)})
    try:
        asked = [SampleRef(i, 1 + v) for v in range(COMPARED // len(chosen)) for i in chosen]
        made = host.batch(asked)
    except (UserError, IndexError):  # an outline of a data set that is not there yet
        return ViewDevice(start.views == "device")
    rendered = to_device(device.batch(asked), machine.device)["image"]
    if not torch.equal(rendered.cpu(), made["image"]):
        said = f"here the device makes other pixels than Pillow, by up to {_difference(rendered.cpu(), made['image'])} grey levels"
        if start.views == "device":
            raise UserError(f"--views device, and {said}; take --views host")
        return ViewDevice(why=f"on the host: {said}")
    if start.views == "device":
        return ViewDevice(True, "on the device, as --views says")
    rates = _rates(host, device, chosen, student, machine, choices)
    return ViewDevice(rates.pays, f"on the {'device' if rates.pays else 'host'}: {rates.line(machine.workers)}")


def _rates(host: Views, device: Views, chosen: Sequence[int], student: Loaded, machine: Machine, choices: Choices) -> Rates:
    """The base images of the chosen samples are in memory by now."""
    at_once = max(1, machine.workers)
    stored = choices.images is not None and choices.images.place is not None
    read_s = 0.0 if stored or machine.workers == 0 else image_cache.estimate(host.split, host.preprocess).seconds / len(host.split)
    some = [SampleRef(i, 1 + v) for v in range(4) for i in chosen]
    host_s, base_s = (_least(partial(views.batch, some)) / len(some) for views in (host, device))
    many = {name: _pinned(tensor, machine.device) for name, tensor in device.batch([some[n % len(some)] for n in range(TIMED)]).items()}
    render_s = _least(lambda: _waited(to_device(many, machine.device)["image"])) / TIMED
    whole = FrozenModel(timed(student.chain, machine.device), None, None, CHUNK.get(machine.device.type, 64), machine.autocast)
    forward_s, _ = time_frozen(whole, student.preprocess.size, machine.device)
    return Rates((host_s + read_s) / at_once, (base_s + read_s) / at_once, render_s, TRAINING * forward_s)


def _least(work: Callable[[], Any], times: int = 5) -> float:
    """Seconds, the least of some: what else the machine does must not look like this work's cost."""
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return min(spent)


def _waited(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _difference(one: Tensor, other: Tensor) -> int:
    return int((one.int() - other.int()).abs().max())
