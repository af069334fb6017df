"""Plans the caches of a run before its first step: measures costs on this machine, and decides stage by stage."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tltrain.cache import cost_model, disk_store
from tltrain.cache.cost_model import Budget, Choice, Speed
from tltrain.cache.frozen import Autocast, FrozenModel, TopK, place_matters
from tltrain.cache.measure import Machine, _Meter, timed
from tltrain.core.flags import RunFlags
from tltrain.core.host.memory import free_memory
from tltrain.core.paths import cache_root
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits
from tltrain.data.dataset import SharedImages
from tltrain.models.chain import Chain
from tltrain.models.factory import Loaded

CHUNK = {"cpu": 32, "cuda": 64}
"""Images at a time in a frozen forward pass, by device. Part of every cache key."""
ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of features under autocast. Without autocast they keep the network's dtype."""
LOGITS = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class StageChoices:
    """The caches of one stage: features of train, features of val, the teacher's answers. None where the stage has no such rows."""

    train: Choice | None = None
    val: Choice | None = None
    teacher: Choice | None = None


@dataclass(frozen=True)
class Choices:
    """The caches of a run."""

    stages: tuple[StageChoices, ...]
    images: Choice | None
    budget: Budget

    def lines(self) -> list[str]:
        """The decisions as lines of the plan."""
        each = [choice for stage in self.stages for choice in (stage.train, stage.val, stage.teacher)]
        return [choice.line() for choice in (*each, self.images) if choice is not None]


def store_root() -> Path:
    """The folder of all caches of this machine, created if absent."""
    root = cache_root() / "store"
    root.mkdir(exist_ok=True)
    return root


def prefix_of(chain: Chain, cut: int, precision: str, finite: bool, autocast: Autocast, chunk: int | None = None) -> FrozenModel:
    """The frozen blocks before `cut`.

    finite: whether its outputs can be cached, so that it runs in chunks. chunk: images at a time; None takes CHUNK.
    """
    return FrozenModel(chain, cut, ROUNDED.get(precision), _chunk(chain, chunk) if finite else None, autocast)


def teacher_of(chain: Chain, recipe: Recipe, num_classes: int, finite: bool, autocast: Autocast, chunk: int | None = None) -> FrozenModel:
    """The whole teacher, or what gives its features. Both are always rounded, so that a run does not depend on whether they are cached."""
    assert recipe.distill is not None
    stop = len(chain.blocks) - 1 if recipe.matches_features else None
    kept, dtype = recipe.distill.top_k, LOGITS[recipe.distill.logits]
    top_k = TopK(kept, recipe.distill.temperature) if kept is not None and kept < num_classes else None
    return FrozenModel(chain, stop, dtype, _chunk(chain, chunk) if finite else None, autocast, top_k)


def _chunk(chain: Chain, wanted: int | None) -> int:
    return 1 if chain.place_matters else wanted or CHUNK.get(next(chain.parameters()).device.type, 64)


def finds_place_matters(loaded: Loaded, device: torch.device, autocast: Autocast) -> bool:
    """`place_matters` of a network in eval mode on the CPU, from one pass over the largest chunk that there is room for.

    Other devices are tested (tests/gpu).
    """
    for num in (CHUNK["cpu"] >> k for k in range(5)) if device.type == "cpu" else ():
        with contextlib.suppress(torch.OutOfMemoryError):
            return place_matters(loaded.chain, loaded.preprocess.size, num, autocast)
    return False


def survey(
    recipe: Recipe,
    start: RunFlags,
    images: DataSplits,
    student: Loaded,
    teacher: Loaded | None,
    planned: Sequence[StagePlan],
    machine: Machine,
) -> Choices:
    """Decide what to cache. The decision does not affect the trained weights. Raises UserError where --cache always is impossible."""
    cost_model.check_always(start.cache, recipe, student.chain, planned)
    if start.cache == "never" and start.cache_images == "never":
        return Choices(tuple(StageChoices() for _ in planned), None, Budget(0, 0, 0))
    budget = find_budget(start, machine.device, machine.local_world)
    surveyor = _Surveyor(recipe, start, images, student, teacher, machine, budget)
    choices = tuple(surveyor.stage(stage) for stage in planned)
    return Choices(choices, _choose_images(start, images, choices, planned, surveyor.meter, budget), budget)


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
        where = f"features before {self.student.blocks[stage.first_trainable_block].name}"
        if stage.first_trainable_block > 0 and (why_not := cost_model.uncut(self.student)) is not None:
            train = Choice(stage.spec.name, where, why_not=why_not)
        elif stage.first_trainable_block > 0:
            prefix = prefix_of(self.student, stage.first_trainable_block, self.machine.precision, True, self.machine.autocast)
            shared = stage.shares_features(self.images.shared)
            train = self._train(stage, f"{where}, train", prefix, stage.images_per_view, self.budget, shared)
            num_val = len(self.images.val) if self.images.val is not None and stage.num_evaluations else 0
            if num_val and shared is not None and train.place is not None:
                val = Choice(stage.spec.name, f"{where}, val", why_not=cost_model.AMONG)
            elif num_val:
                num_reads = stage.num_evaluations * min(num_val, self.recipe.data.eval_limit or num_val)
                speed = self.meter.speed(prefix, "none")
                left = self.budget.without(train)
                val = cost_model.choose(self.start.cache, stage.spec.name, f"{where}, val", num_val, 1, num_reads, speed, left)
        if self.teacher is not None and stage.taught:
            logits = self._answers(stage, self.teacher, self.budget.without(train).without(val))
        return StageChoices(train, val, logits)

    def _answers(self, stage: StagePlan, teacher: Chain, budget: Budget) -> Choice:
        assert self.recipe.distill is not None
        num_classes, top_k = len(self.images.classes), self.recipe.distill.top_k
        frozen = teacher_of(teacher, self.recipe, num_classes, True, self.machine.autocast)
        what = f"the teacher's {'logits' if stage.features is None else 'features'}"
        if stage.features is not None and (side := stage.features.side) is not None:
            what += f" at {side} x {side} places"
        if top_k is not None:
            what += f" (top {top_k} of {num_classes:,} classes)" if frozen.top_k else f" (top_k is {top_k}: all {num_classes} classes)"
        choice = self._train(stage, what, frozen, 0, budget, stage.shares(self.images.shared))
        return choice if frozen.top_k is None else replace(choice, all_row_bytes=num_classes * LOGITS[self.recipe.distill.logits].itemsize)

    def _train(
        self, stage: StagePlan, what: str, frozen: FrozenModel, num_images: int, budget: Budget, shared: SharedImages | None
    ) -> Choice:
        """num_images: that need not be loaded where a row is cached. shared: the images of all folds, where these share the rows."""
        why_not = cost_model.why_not_cacheable(stage)
        if why_not is not None:
            return Choice(stage.spec.name, what, why_not=why_not)
        speed = self.meter.speed(frozen, stage.spec.augment, num_images)
        num_views, num_reads = cost_model.num_views(self.recipe, stage), stage.num_reads
        num, num_runs = (stage.num_samples, 1) if shared is None else self._of_all_folds(shared)
        return cost_model.choose(self.start.cache, stage.spec.name, what, num, num_views, num_reads, speed, budget, num_runs=num_runs)

    def _of_all_folds(self, shared: SharedImages) -> tuple[int, int]:
        return len(shared.split), self.recipe.data.folds or 1


def find_budget(start: RunFlags, device: torch.device, local_world: int) -> Budget:
    """As the flags say, else a quarter of the device's free memory, half of the host's for all its processes, half of the disk."""
    on_device = 0
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0] // 4
    memory, disk = free_memory() // 2 // local_world, disk_store.default_limit(store_root())
    flags = (start.cache_device_gb, start.cache_memory_gb, start.cache_disk_gb)
    limits = [default if flag is None else int(flag * 1e9) for flag, default in zip(flags, (on_device, memory, disk), strict=True)]
    return Budget(limits[0] if device.type == "cuda" else 0, limits[1], limits[2])


def _choose_images(
    start: RunFlags, images: DataSplits, stages: Sequence[StageChoices], planned: Sequence[StagePlan], meter: _Meter, budget: Budget
) -> Choice | None:
    """Decide whether to cache base images: only if they would be read from files more than once."""
    if not meter.readable or (meter.in_memory and start.cache_images == "auto"):
        return None
    num_reads, limit = 0.0, meter.recipe.data.eval_limit
    for choices, stage in zip(stages, planned, strict=True):
        stored = choices.train is not None and choices.train.place is not None
        rows = choices.train.num_rows if choices.train is not None else 0
        num_reads += (rows if stored else stage.num_reads) * stage.images_per_view
        if images.val is not None and (choices.val is None or choices.val.place is None):
            num_reads += stage.num_evaluations * min(len(images.val), limit or len(images.val))
    num = len(images.pool) + (len(images.val) if images.val is not None else 0)
    num, num_runs = (num, 1) if images.shared is None else (len(images.shared.split), meter.recipe.data.folds or 1)
    speed = Speed(meter.base_s / max(1, meter.workers), 0.0, int(meter.base_bytes))
    mapped = Budget(0, 0, budget.disk)  # images differ in size, so they stay memory-mapped
    return cost_model.choose(start.cache_images, "images", "base images", num, 1, num_reads, speed, mapped, "--cache-images", num_runs)
