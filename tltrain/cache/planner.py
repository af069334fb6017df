"""What a run could compute once: measured on this machine, and decided stage by stage before the first step."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tltrain.cache import cost_model, disk_store, image_cache
from tltrain.cache.cost_model import Budget, Choice, Speed
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.paths import cache_root
from tltrain.core.recipe import Augment, Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits, Split
from tltrain.data.views import KEPT_BYTES, Views
from tltrain.evaluation.evaluator import FrozenModel
from tltrain.models.chain import Chain
from tltrain.models.factory import Loaded

Autocast = Callable[[], AbstractContextManager[None]]
CHUNK = {"cpu": 32, "cuda": 64}
"""Images that a frozen network sees at a time; part of every store's key."""
ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What features are rounded to under autocast; without it they stay as they are."""
LOGITS = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class StageChoices:
    """What one stage stores: its training images' features, those of val, the teacher's logits. None: it has no such thing."""

    train: Choice | None = None
    val: Choice | None = None
    teacher: Choice | None = None


@dataclass(frozen=True)
class Choices:
    """What a run stores."""

    stages: tuple[StageChoices, ...]
    images: Choice | None
    budget: Budget

    def lines(self) -> list[str]:
        each = [choice for stage in self.stages for choice in (stage.train, stage.val, stage.teacher)]
        return [choice.line() for choice in (*each, self.images) if choice is not None]


def store_root() -> Path:
    """The folder of all stores of this machine's cache."""
    root = cache_root() / "store"
    root.mkdir(exist_ok=True)
    return root


def prefix_of(chain: Chain, cut: int, precision: str, finite: bool, autocast: Autocast, chunk: int | None = None) -> FrozenModel:
    """The blocks before `cut`, frozen. finite: what it says could be stored, so that it runs in chunks. chunk: None for the usual one."""
    return FrozenModel(chain, cut, ROUNDED.get(precision), (chunk or _usual_chunk(chain)) if finite else None, autocast)


def teacher_of(chain: Chain, recipe: Recipe, finite: bool, autocast: Autocast, chunk: int | None = None) -> FrozenModel:
    """The whole teacher. Its logits are always rounded, so that a run does not depend on whether they were stored."""
    assert recipe.distill is not None
    return FrozenModel(chain, None, LOGITS[recipe.distill.logits], (chunk or _usual_chunk(chain)) if finite else None, autocast)


def _usual_chunk(chain: Chain) -> int:
    return CHUNK.get(next(chain.parameters()).device.type, 64)


@dataclass(frozen=True)
class Machine:
    """Where a run goes on, as far as its stores are concerned."""

    device: torch.device
    precision: str
    autocast: Autocast
    workers: int
    local_world: int


def survey(
    recipe: Recipe,
    start: RunFlags,
    images: DataSplits,
    student: Loaded,
    teacher: Loaded | None,
    planned: Sequence[StagePlan],
    machine: Machine,
) -> Choices:
    """Decide what is stored. Nothing of it changes what is learned. Raises UserError where --store always cannot be had."""
    cost_model.check_always(start.store, recipe, student.chain, planned)
    if start.store == "never" and start.store_images == "never":
        return Choices(tuple(StageChoices() for _ in planned), None, Budget(0, 0, 0))
    budget = find_budget(start, machine.device, machine.local_world)
    surveyor = _Surveyor(recipe, start, images, student, teacher, machine, budget)
    made = tuple(surveyor.stage(stage) for stage in planned)
    return Choices(made, _choose_images(start, images, made, planned, surveyor.meter, budget), budget)


def _limits() -> list[int]:
    """Bytes that control groups leave this process, as containers and Slurm set them."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, kinds, path = line.split(":", 2)
        root, name = ("/sys/fs/cgroup", "memory.max") if number == "0" else ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        if number != "0" and "memory" not in kinds.split(","):
            continue
        here = Path(root + path)
        for folder in (here, *here.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit here, or "max"
                found.append(int((folder / name).read_text()))
    return found


class _Surveyor:
    def __init__(
        self, recipe: Recipe, start: RunFlags, images: DataSplits, student: Loaded, teacher: Loaded | None, machine: Machine, budget: Budget
    ) -> None:
        self.recipe, self.start, self.images, self.machine, self.budget = recipe, start, images, machine, budget
        self.meter = _Meter(images, student, recipe, machine.device, machine.workers)
        self.student = timed(student.chain, machine.device)
        self.teacher = None if teacher is None else timed(teacher.chain, machine.device)

    def stage(self, stage: StagePlan) -> StageChoices:
        train = val = logits = None
        where = f"features before {self.student.blocks[stage.first].name}"
        if stage.first > 0 and (why_not := cost_model.uncut(self.student)) is not None:
            train = Choice(stage.spec.name, where, why_not=why_not)
        elif stage.first > 0:
            prefix = prefix_of(self.student, stage.first, self.machine.precision, True, self.machine.autocast)
            train = self._train(stage, f"{where}, train", prefix, True, self.budget)
            num_val = len(self.images.val) if self.images.val is not None else 0
            if num_val:
                asked = cost_model.num_evaluations(stage) * min(num_val, self.recipe.data.eval_limit or num_val)
                speed = self.meter.speed(prefix, "none")
                left = self.budget.without(train)
                val = cost_model.choose(self.start.store, stage.spec.name, f"{where}, val", num_val, 1, asked, speed, left)
        if self.teacher is not None:
            whole = teacher_of(self.teacher, self.recipe, True, self.machine.autocast)
            logits = self._train(stage, "the teacher's logits", whole, False, self.budget.without(train).without(val))
        return StageChoices(train, val, logits)

    def _train(self, stage: StagePlan, what: str, frozen: FrozenModel, with_image: bool, budget: Budget) -> Choice:
        """with_image: a stored row spares the image too."""
        why_not = cost_model.why_not_cacheable(stage)
        if why_not is not None:
            return Choice(stage.spec.name, what, why_not=why_not)
        speed = self.meter.speed(frozen, stage.spec.augment, with_image)
        num_views, asked = cost_model.num_views(self.recipe, stage), stage.num_steps * stage.batch
        return cost_model.choose(self.start.store, stage.spec.name, what, len(self.images.train), num_views, asked, speed, budget)


def find_budget(start: RunFlags, device: torch.device, local_world: int) -> Budget:
    """As the flags say, else a quarter of the device's free memory, half of the host's for all its processes, half of the disk."""
    on_device = 0
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0] // 4
    memory, disk = _free_memory() // 2 // local_world, disk_store.default_limit(store_root())
    flags = (start.store_device_gb, start.store_memory_gb, start.store_disk_gb)
    found = [default if flag is None else int(flag * 1e9) for flag, default in zip(flags, (on_device, memory, disk), strict=True)]
    return Budget(found[0] if device.type == "cuda" else 0, found[1], found[2])


def _free_memory() -> int:
    """Bytes of host memory that could be had."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        return min(free, *(_limits() or [free]))
    except (OSError, StopIteration):
        return 2 * 2**30  # a system that does not say


def timed(chain: Chain, device: torch.device) -> Chain:
    """The network as it can be timed: on the device, with weights or with numbers in their place. The original stays as it is."""
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
    """Times of this machine, each taken once."""

    def __init__(self, images: DataSplits, student: Loaded, recipe: Recipe, device: torch.device, workers: int) -> None:
        self.split, self.student, self.recipe, self.device, self.workers = images.train, student, recipe, device, workers
        self.known: dict[Any, Any] = {}
        self.base_s, self.base_bytes = self._base()

    @property
    def kept(self) -> bool:
        """Whether a process keeps all base images in memory anyway."""
        return self.workers == 0 and self.base_bytes * len(self.split) <= KEPT_BYTES

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
                _seconds(lambda: [views.view(i, 1) for i in self._sample()]) / len(self._sample()) if self.readable else 0
            )
        return (self.known["view", augment] + (0 if self.kept else self.base_s)) / max(1, self.workers)

    def _sample(self) -> list[int]:
        return [i * len(self.split) // 4 for i in range(4)]

    def _base(self) -> tuple[float, float]:
        """Seconds and bytes of one base image, on average."""
        num = len(self.split)
        try:
            found = image_cache.estimate(self.split, self.student.preprocess)
        except (UserError, IndexError):  # an outline of a data set that is not there yet
            self.readable = False
            return 0.0, 3.0 * self.student.preprocess.resize**2
        self.readable = True
        return found.seconds / num, found.bytes / num


def _views(split: Split, student: Loaded, recipe: Recipe, augment: Augment) -> Views:
    return Views(split, student.preprocess, augment, recipe.data.flip, recipe.data.seed)


def time_frozen(frozen: FrozenModel, side: int, device: torch.device) -> tuple[float, int]:
    """(seconds an image, bytes of its row): of one image first, and of several where that is quick."""

    def once(num: int) -> tuple[float, Tensor]:
        images = torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, device=device)
        began = time.perf_counter()
        with torch.no_grad(), frozen.autocast():
            out = frozen.chain(images, stop=frozen.stop)
            out = out if frozen.dtype is None else out.to(frozen.dtype)
            float(out.flatten()[0])  # waits for the device
        return time.perf_counter() - began, out

    tries = [once(1) for _ in range(2)]
    spent, out = tries[-1]
    row_bytes = out.numel() * out.element_size()
    if spent < 1.0:  # the least of some: what else this machine does must not look like the network's cost
        spent = min(once(1)[0] for _ in range(3))
    if spent < 0.1:
        num = frozen.chunk or 8 if device.type == "cuda" else 8
        with contextlib.suppress(torch.OutOfMemoryError):  # then what one image takes must do
            spent = min(once(num)[0] for _ in range(3)) / num
    return spent, row_bytes


def _seconds(work: Callable[[], Any]) -> float:
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return min(spent)


def _choose_images(
    start: RunFlags, images: DataSplits, made: Sequence[StageChoices], planned: Sequence[StagePlan], meter: _Meter, budget: Budget
) -> Choice | None:
    """Base images are stored where they must be read from files again and again."""
    if not meter.readable or (meter.kept and start.store_images == "auto"):
        return None
    asked, limit = 0.0, meter.recipe.data.eval_limit
    for choices, stage in zip(made, planned, strict=True):
        stored = choices.train is not None and choices.train.place is not None
        rows = choices.train.num_rows if choices.train is not None else 0
        asked += rows if stored else stage.num_steps * stage.batch
        if images.val is not None and (choices.val is None or choices.val.place is None):
            asked += cost_model.num_evaluations(stage) * min(len(images.val), limit or len(images.val))
    num = len(images.train) + (len(images.val) if images.val is not None else 0)
    speed = Speed(meter.base_s / max(1, meter.workers), 0.0, int(meter.base_bytes))
    mapped = Budget(0, 0, budget.disk)  # their widths differ: they are never copied into one tensor
    return cost_model.choose(start.store_images, "images", "base images", num, 1, asked, speed, mapped, "--store-images")
