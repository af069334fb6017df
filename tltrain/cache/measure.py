"""Measures on this machine the seconds per image of loading views and of frozen forward passes."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tltrain.cache import image_cache
from tltrain.cache.cost_model import Speed
from tltrain.cache.frozen import Autocast, FrozenModel
from tltrain.core.errors import UserError
from tltrain.core.recipe import Augment, Recipe
from tltrain.data import DataSplits, Split
from tltrain.data.views import MEMORY_BYTES, Views
from tltrain.models.chain import Chain
from tltrain.models.factory import Loaded


@dataclass(frozen=True)
class Machine:
    """The properties of this process that decide about caches."""

    device: torch.device
    precision: str
    autocast: Autocast
    workers: int
    local_world: int


def timed(chain: Chain, device: torch.device) -> Chain:
    """A network on the device that can be timed: a copy if the original lies elsewhere. Meta tensors get arbitrary values."""
    if next(chain.parameters()).device.type == device.type:
        return chain
    chain = copy.deepcopy(chain)
    if not next(chain.parameters()).is_meta:
        return chain.to(device)
    chain.to_empty(device=device)
    for tensor in (*chain.parameters(), *chain.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor.data, 0.01, 0.02)
        else:
            tensor.data.zero_()
    return chain


class _Meter:
    """Measures times, each one once."""

    def __init__(self, images: DataSplits, student: Loaded, recipe: Recipe, device: torch.device, workers: int) -> None:
        self.split, self.student, self.recipe, self.device, self.workers = images.train, student, recipe, device, workers
        self.known: dict[Any, Any] = {}
        self.base_s, self.base_bytes = self._base()

    @property
    def in_memory(self) -> bool:
        """Whether this process keeps all base images in memory without a cache."""
        return self.workers == 0 and self.base_bytes * len(self.split) <= MEMORY_BYTES

    def speed(self, frozen: FrozenModel, augment: Augment, with_image: bool = True) -> Speed:
        key = (id(frozen.chain), frozen.stop)
        if key not in self.known:
            self.known[key] = time_frozen(frozen, self.student.preprocess.size, self.device)
        frozen_s, row_bytes = self.known[key]
        return Speed(self._image_s(augment) if with_image else 0.0, frozen_s, row_bytes, self.device.type == "cuda")

    def _image_s(self, augment: Augment) -> float:
        if ("view", augment) not in self.known:
            views = _views(self.split, self.student, self.recipe, augment)
            self.known["view", augment] = (
                least_s(lambda: [views.view(i, 1) for i in self._sample()]) / len(self._sample()) if self.readable else 0
            )
        return (self.known["view", augment] + (0 if self.in_memory else self.base_s)) / max(1, self.workers)

    def _sample(self) -> list[int]:
        return [i * len(self.split) // 4 for i in range(4)]

    def _base(self) -> tuple[float, float]:
        """(seconds, bytes) of one base image, on average."""
        num = len(self.split)
        try:
            estimate = image_cache.estimate(self.split, self.student.preprocess)
        except (UserError, IndexError):  # a plan for a data set that is absent
            self.readable = False
            return 0.0, 3.0 * self.student.preprocess.resize**2
        self.readable = True
        return estimate.seconds / num, estimate.bytes / num


def _views(split: Split, student: Loaded, recipe: Recipe, augment: Augment) -> Views:
    return Views(split, student.preprocess, augment, recipe.data.flip, recipe.data.seed)


def time_frozen(frozen: FrozenModel, side: int, device: torch.device) -> tuple[float, int]:
    """(seconds per image, bytes of its row). Times one image first, then a chunk of images if one image was quick."""

    def run(num: int) -> tuple[float, Tensor]:
        images = torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, device=device)
        began, began_cpu = time.perf_counter(), time.process_time()
        with torch.no_grad(), frozen.autocast():
            out = frozen.chain(images, stop=frozen.stop)
            out = out if frozen.dtype is None else out.to(frozen.dtype)
            float(out.flatten()[0])  # waits for the device
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        return min(wall_s, cpu_s) if device.type == "cpu" else wall_s, out  # the other load of a busy machine is not the network's cost

    tries = [run(1) for _ in range(2)]
    spent, out = tries[-1]
    row_bytes = out.numel() * out.element_size()
    if spent < 1.0:  # the minimum excludes other load on this machine
        spent = min(run(1)[0] for _ in range(3))
    if spent < 0.1:
        num = frozen.chunk or 8 if device.type == "cuda" else 8
        with contextlib.suppress(torch.OutOfMemoryError):  # then the time of one image is used
            spent = min(run(num)[0] for _ in range(3)) / num
    return spent, row_bytes


def least_s(work: Callable[[], Any], times: int = 3) -> float:
    """Seconds of one call: the minimum of several, which other load on the machine affects least."""
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return min(spent)
