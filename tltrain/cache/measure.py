"""Measures on this machine the seconds per image of loading views and of frozen forward passes."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tltrain.cache import image_cache
from tltrain.cache.cost_model import Speed
from tltrain.cache.frozen import Autocast, FrozenModel
from tltrain.core.errors import UserError
from tltrain.core.recipe import Augment, Recipe
from tltrain.data import DataSplits, Split
from tltrain.data.views import MEMORY_BYTES, Views
from tltrain.heads.standardised import one_thread
from tltrain.models.chain import Chain
from tltrain.models.factory import Loaded

QUICK_S = 0.1
"""Below this time of one image, seconds, several are timed at a time."""
BUSY_OPERATIONS_S = 20e9
"""Operations a second below which a CPU's threads are suspected to wait for each other."""
SLOWEST_OPERATIONS_S = 1e9
"""Operations a second that any CPU reaches in a convolution; a Raspberry Pi 4 reaches ten times as many."""
LEAST_S = 0.02
"""Seconds that a pass may take beside its operations."""


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

    def speed(self, frozen: FrozenModel, augment: Augment, num_images: int = 1) -> Speed:
        key = (id(frozen.chain), frozen.stop)
        if key not in self.known:
            self.known[key] = time_frozen(frozen, self.student.preprocess.size, self.device)
        frozen_s, row_bytes = self.known[key]
        return Speed(num_images * self.image_s(augment) if num_images else 0.0, frozen_s, row_bytes, self.device.type == "cuda")

    def image_s(self, augment: Augment) -> float:
        """Seconds of one view, shared out over the data workers."""
        if ("view", augment) not in self.known:
            views = _views(self.split, self.student, self.recipe, augment)
            self.known["view", augment] = (
                least_s(lambda: [views.view(i, 1) for i in self._sample()], clock=time.thread_time) / len(self._sample())
                if self.readable
                else 0
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
    """(seconds per image, bytes of its row).

    The median of several passes: of one image, and of a few where one was quick. On a CPU the time of this process alone counts, at most
    what one thread takes, and at most what the number of operations lets any machine take: on a busy machine threads spin while they
    wait for each other, and both clocks run.
    """
    out, operations = _counted(frozen, side, device)  # the first pass, which also allocates
    row_bytes = out.numel() * out.element_size()
    if device.type != "cpu":
        spent = _median(lambda: _pass_s(frozen, 1, side, device))
        if spent < QUICK_S:
            num = frozen.chunk or 8
            with contextlib.suppress(torch.OutOfMemoryError):  # then the time of one image is used
                spent = _median(lambda: _pass_s(frozen, num, side, device)) / num
        return spent, row_bytes
    spent = _median(lambda: _pass_s(frozen, 1, side, device))
    if spent < QUICK_S:
        with contextlib.suppress(torch.OutOfMemoryError):
            spent = min(spent, _median(lambda: _pass_s(frozen, 8, side, device)) / 8)
    if torch.get_num_threads() > 1 and spent > operations / BUSY_OPERATIONS_S:
        with one_thread():
            spent = min(spent, _median(lambda: _pass_s(frozen, 1, side, device)))
    return min(spent, LEAST_S + operations / SLOWEST_OPERATIONS_S), row_bytes


def row_bytes(frozen: FrozenModel, side: int, device: torch.device) -> int:
    """Bytes of the row of one image, as `time_frozen` gives them, without a measurement."""
    out = _forward(frozen, 1, side, device)
    return out.numel() * out.element_size()


def _counted(frozen: FrozenModel, side: int, device: torch.device) -> tuple[Tensor, int]:
    """(row of one image, floating-point operations of its forward pass)."""
    with FlopCounterMode(display=False) as counter:
        out = _forward(frozen, 1, side, device)
    return out, counter.get_total_flops()


def _forward(frozen: FrozenModel, num: int, side: int, device: torch.device) -> Tensor:
    images = torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, device=device)
    with torch.no_grad(), frozen.autocast():
        out = frozen.kept(frozen.chain(images, stop=frozen.stop))
        float(out.flatten()[0])  # waits for the device
    return out


def _pass_s(frozen: FrozenModel, num: int, side: int, device: torch.device) -> float:
    """Seconds of one pass. On a CPU the lesser of both clocks: other processes lengthen the wall's, more threads the process's."""
    began, began_cpu = time.perf_counter(), time.process_time()
    _forward(frozen, num, side, device)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    return min(wall_s, cpu_s) if device.type == "cpu" else wall_s


def _median(measure: Callable[[], float], times: int = 3) -> float:
    return statistics.median(measure() for _ in range(times))


def least_s(work: Callable[[], Any], times: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call: the minimum of several, which other load on the machine affects least.

    clock: `time.thread_time` for work of this thread alone that waits for nothing. Other load does not affect it at all.
    """
    spent = []
    for _ in range(times):
        began = clock()
        work()
        spent.append(clock() - began)
    return min(spent)
