"""Cost model: does caching pay off, and where should the cache be read from?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tltrain.cache.feature_table import Place
from tltrain.core.errors import UserError
from tltrain.core.output.console import duration, size
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.models.chain import Chain

Mode = Literal["auto", "always", "never"]
AMONG = "among those of train, which hold every fold"
LEAST_SAVED_S = 1.0
"""Smallest saving for which a cache is written, seconds."""
DISK_BYTES_S = 1e9
"""Assumed rate at which a disk writes, checks and reads, bytes a second."""


@dataclass(frozen=True)
class Budget:
    """Bytes that a cache may take, by the place its rows are read from."""

    device: int
    memory: int
    disk: int

    def place(self, num_bytes: int) -> Place | None:
        """The fastest place with room for `num_bytes`. None if they exceed the disk budget: every cache is written to disk."""
        if num_bytes > self.disk:
            return None
        return "device" if num_bytes <= self.device else "memory" if num_bytes <= self.memory else "disk"

    def without(self, choice: Choice | None) -> Budget:
        """The budget that remains beside a cache that is open at the same time."""
        num_bytes = 0 if choice is None else choice.num_bytes
        on_device, in_memory = (num_bytes * (choice is not None and choice.place == place) for place in ("device", "memory"))
        return Budget(self.device - on_device, self.memory - in_memory, self.disk)


@dataclass(frozen=True)
class Speed:
    """The cost of one image on this machine, and the size of its cached row."""

    image_s: float
    """Seconds to make a view: read, decode, resize, augment."""
    frozen_s: float
    """Seconds of the frozen blocks' forward pass."""
    row_bytes: int
    overlaps: bool = False
    """Whether views are made while the device computes. The total is then the slower of the two."""

    @property
    def total_s(self) -> float:
        return max(self.image_s, self.frozen_s) if self.overlaps else self.image_s + self.frozen_s


@dataclass(frozen=True)
class Choice:
    """The decision whether to cache one kind of row for one stage."""

    stage: str
    what: str
    """The kind of row, such as `features before layer4.0, train` or `the teacher's logits`."""
    num_rows: int = 0
    num_views: int = 0
    speed: Speed = Speed(0, 0, 0)
    saved_s: float = 0.0
    place: Place | None = None
    """Where the rows are read from; None if they are not cached."""
    why_not: str = ""
    num_runs: int = 1
    """The runs that the store serves: the folds of a recipe share one."""
    all_row_bytes: int | None = None
    """Bytes of a row with all logits. None where all are kept."""

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.speed.row_bytes

    @property
    def fill_s(self) -> float:
        return self.num_rows * self.speed.total_s

    def line(self) -> str:
        """The decision as one line of the plan."""
        begin = f"{self.stage}: {self.what}"
        if not self.num_rows:
            return f"{begin} {self.why_not}" if self.why_not == AMONG else f"{begin} not stored: {self.why_not}"
        shared = f" once for {self.num_runs} folds" if self.num_runs > 1 else ""
        views = f"{self.num_views} view{'s' if self.num_views > 1 else ''} of {self.num_rows // self.num_views:,} images"
        instead = "" if self.all_row_bytes is None else f" (all classes: {size(self.num_rows * self.all_row_bytes)})"
        sizes = f"{views} x {size(self.speed.row_bytes)} = {size(self.num_bytes)}{instead}, {duration(self.fill_s)} to fill{shared}"
        saves = f"saves {duration(max(self.saved_s, 0))}" if self.saved_s > -0.05 else f"costs {duration(-self.saved_s)} more"
        where = f"read from {'the ' if self.place != 'memory' else ''}{self.place}" if self.place else f"not stored: {self.why_not}"
        return f"{begin}, {sizes}, {saves}: {where}"


def choose(
    mode: Mode,
    stage: str,
    what: str,
    num_images: int,
    num_views: int,
    num_reads: float,
    speed: Speed,
    budget: Budget,
    flag: str = "--cache",
    num_runs: int = 1,
) -> Choice:
    """Decide whether to cache the rows of `num_images` images in `num_views` views each.

    num_reads: number of rows that the stage reads in all. flag: the flag that set `mode`, for messages. num_runs: that share the store.
    Raises UserError where mode is always and the rows exceed the disk budget.
    """
    num_rows = num_images * num_views
    place = budget.place(num_rows * speed.row_bytes)
    moved = speed.row_bytes * (2 * num_rows + (num_reads if place == "disk" else num_rows))  # written, checked, read
    saved_s = (num_reads - num_rows / num_runs) * speed.total_s - moved / DISK_BYTES_S
    choice = Choice(stage, what, num_rows, num_views, speed, saved_s, num_runs=num_runs)
    why_not = ""
    if mode == "never":
        why_not = f"{flag} never"
    elif place is None:
        why_not = f"the budget on the disk is {size(budget.disk)}"
        if mode == "always":
            views = "lower views, " if num_views > 1 else ""
            raise UserError(f"{flag} always, but {choice.line()}{why_not}; raise --cache-disk-gb, {views}or take {flag} auto")
    elif mode == "auto" and saved_s < LEAST_SAVED_S:
        why_not = f"it saves less than {LEAST_SAVED_S:g} s"
    return Choice(stage, what, num_rows, num_views, speed, saved_s, None if why_not else place, why_not, num_runs)


def why_not_cacheable(stage: StagePlan) -> str | None:
    """The reason why a stage's training rows cannot be cached: its views, or what they are mixed with, never repeat. None if they can."""
    spec, mixes = stage.spec, stage.images_per_view > 1
    if stage.mixes_anew and mixes:
        return "this run began with a tltrain that mixes images differently in each step (a new run mixes by view)"
    if spec.views is None and spec.augment == "none" and not spec.erasing and not mixes:
        return "views is null, so every step gets a new view (set views: 1; without augmentation all views are equal)"
    return "views is null, so every step gets a new view (set views)" if spec.views is None else None


def uncut(chain: Chain) -> str | None:
    """The reason why no features of this network can be cached, whatever the stage. None if they can."""
    return "blocks of this network cannot run one by one" if chain.runs_whole else None


def num_views(recipe: Recipe, stage: StagePlan) -> int:
    """The number of different views of each image that a stage uses. The stage's `views` must not be null."""
    assert stage.spec.views is not None
    epochs = math.ceil(stage.num_reads / stage.num_samples)
    return stage.spec.views if recipe.data.balance == "sampler" else min(stage.spec.views, epochs)


def check_always(mode: Mode, recipe: Recipe, chain: Chain, planned: Sequence[StagePlan]) -> None:
    """Raises UserError for --cache always with a stage that cannot be cached."""
    for stage in planned if mode == "always" else ():
        why = why_not_cacheable(stage) or (uncut(chain) if stage.first_trainable_block > 0 else None)
        if why is not None and (stage.first_trainable_block > 0 or (recipe.distill is not None and stage.taught)):
            raise UserError(f"--cache always, but stage {stage.spec.name} cannot be cached: {why}; or take --cache auto")
