"""Resolves the stages of a recipe: number of steps, learning-rate scale of each block, schedule, evaluation steps.

Pure functions of a recipe, a chain and the number of training samples.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe, Stage

Shared = TypeVar("Shared")
AUTO = "auto"
"""An `unfreeze` that a race settles before the run begins (tltrain/training/depths)."""
RACE = "race.json"
"""In a run folder: what the races of depths said, by stage."""
RANGE = 1e-6
"""Where the schedule range begins, as a share of lr."""


class HasBlocks(Protocol):
    """The part of a Chain that a plan needs."""

    @property
    def blocks(self) -> Sequence[Any]: ...

    def index(self, name: str) -> int:
        """Index of the block that a recipe's `unfreeze` names. Raises UserError."""
        ...


@dataclass(frozen=True)
class TaughtFeatures:
    """What a stage learns of a teacher's features, by a linear map from the student's."""

    num_in: int
    """Numbers of the student's features, at each place of its map where it learns a map."""
    num_out: int = 0
    """Those of the teacher's. 0 in a plan without its teacher."""
    side: int | None = None
    """Places each way of the grid that the maps of both are averaged to. None: pooled features are learned, and there is no grid. 0 in a
    plan without its teacher."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of a recipe, resolved for a network and a data set."""

    index: int
    spec: Stage
    scales: tuple[float, ...]
    """Learning-rate scale of each block. 0: the block is frozen."""
    num_steps: int
    num_samples: int
    batch: int
    first_step: int
    """Planned optimizer steps of all stages before this one."""
    first_epoch: int
    """Planned epochs of all stages before this one, each rounded up. Fresh views are numbered from here."""
    taught: bool = True
    """Whether it learns from the recipe's teacher, if that has one, and from pictures without labels."""
    features: TaughtFeatures | None = None
    """What it learns of a teacher without labels, by a linear map in place of the head. None: it learns labels."""
    mixes_anew: bool = False
    """A run of tltrain 0.1 goes on as it began: finite views are mixed anew in each step."""
    moved: bool = False
    """Whether a stage before it trains a block that this one freezes: what those blocks give belongs to this run alone."""

    @property
    def images_per_view(self) -> int:
        """Images that are decoded for one training view: a mixed one is made of two."""
        return 2 if self.spec.mixup or self.spec.cutmix else 1

    @property
    def mixes_by_view(self) -> bool:
        """Whether an image's partner, share and box belong to the number of the view. Where views are fresh they belong to the step."""
        return self.images_per_view == 2 and self.spec.views is not None and not self.mixes_anew

    def shares(self, shared: Shared | None) -> Shared | None:
        """The images of all folds whose rows this stage takes its own from. None: it has rows of its own, as with partners of its own."""
        return None if self.mixes_by_view else shared

    def shares_features(self, shared: Shared | None) -> Shared | None:
        """As `shares`, of the features that its frozen blocks give. A teacher's rows are shared whatever was trained before."""
        return None if self.moved else self.shares(shared)

    @property
    def first_trainable_block(self) -> int:
        """Index of the first block that trains."""
        return next(i for i, scale in enumerate(self.scales) if scale > 0)

    @property
    def name(self) -> str:
        return f"{self.index}-{self.spec.name}"

    @property
    def lr(self) -> float:
        """Peak learning rate of the head. 0 where it is solved."""
        return self.spec.lr or 0.0

    @property
    def num_reads(self) -> int:
        """Training views that the stage takes in, repeats included."""
        return self.num_samples * (self.spec.views or 1) if self.spec.solve else self.num_steps * self.batch

    @property
    def num_evaluations(self) -> int:
        """Evaluations of val in a stage that runs to its end."""
        if self.features is not None:
            return 0  # it has no answers yet
        return 2 if self.spec.solve else 1 + max(1, math.ceil(self.epoch(self.num_steps) / self.spec.eval_epochs - 1e-9))

    @property
    def log_steps(self) -> int:
        """Steps between two training rows: about a hundred rows a stage."""
        return max(1, math.ceil(self.num_steps / 100))

    def epoch(self, step: int) -> float:
        """Epochs completed after `step` steps. The one step of a solved head takes in every view of every image."""
        return (self.num_reads if self.spec.solve else step * self.batch) / self.num_samples * (step > 0)

    def place(self, step: int) -> dict[str, Any]:
        """The place in the run after `step` steps of this stage, as rows of the metrics name it."""
        where = {"stage": self.spec.name, "stage_index": self.index, "step": step}
        return {**where, "run_step": self.first_step + step, "epoch": self.epoch(step)}

    def lr_factor(self, step: int) -> float:
        """Factor of each group's peak learning rate in step `step` (from 0)."""
        s = self.spec
        num_warmup = round(s.warmup * self.num_steps)
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        if s.schedule == "step":
            return float(s.step_gamma ** math.floor(self.epoch(step) / s.step_epochs + 1e-9))
        if s.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (self.num_steps - num_warmup)))
        if s.schedule == "range":  # each step multiplies it by the same factor, up to lr in the last one
            return float(RANGE ** (1 - (step + 1) / self.num_steps))
        return 1.0

    def evaluates_after(self, step: int) -> bool:
        """Whether val is evaluated after `step` steps: at the start, every eval_epochs, and at the end."""
        if self.features is not None or step in (0, self.num_steps):
            return self.features is None
        period = self.spec.eval_epochs * self.num_samples
        return math.floor(step * self.batch / period + 1e-9) > math.floor((step - 1) * self.batch / period + 1e-9)


def is_open(recipe: Recipe) -> bool:
    """Whether a depth is still to be chosen."""
    return any(stage.unfreeze == AUTO for stage in recipe.stages)


def check_one_races(recipe: Recipe, num_processes: int) -> None:
    """Check that no depth is left for several processes to choose. Raises UserError."""
    if num_processes > 1 and is_open(recipe):
        raise UserError(
            "unfreeze: auto is raced by one process, whose choice several then train with; start the same `tltrain train` once without the "
            "launcher, stop it when the race has ended (Ctrl-C), and go on with the launcher. Or name the depth"
        )


def as_kept(recipe: Recipe, kept: Recipe, raced: Container[str]) -> Recipe:
    """The recipe with the depths that races chose for a run of it. A depth that somebody named is not one of them.

    kept: the recipe in the run's folder. raced: names of the stages whose depth a race chose.
    """
    if len(recipe.stages) != len(kept.stages):
        return recipe
    stages = enumerate(zip(recipe.stages, kept.stages, strict=True))
    chosen = {f"stages.{i}.unfreeze": own.unfreeze for i, (stage, own) in stages if stage.unfreeze == AUTO and own.name in raced}
    return recipe.override(chosen) if chosen else recipe


def deepest(recipe: Recipe) -> Recipe:
    """The recipe with the whole network in place of each depth that is still to be chosen: the most that it can become."""
    chosen = {f"stages.{i}.unfreeze": "all" for i, stage in enumerate(recipe.stages) if stage.unfreeze == AUTO}
    return recipe.override(chosen) if chosen else recipe


def scales(blocks: Sequence[Any], first: int, layer_decay: float) -> tuple[float, ...]:
    """Learning-rate scale of each block: 0 before `first`, then layer_decay ** (layers between it and the head), as in BEiT and timm.

    A layer is a block, unless the block counts by itself (`Block.distances`). Its parameters may then lie at several distances: the scale
    of a block is that of its nearest one to the head.
    """
    return tuple(layer_decay ** _nearest(blocks, i) if i >= first else 0.0 for i in range(len(blocks)))


def _nearest(blocks: Sequence[Any], index: int) -> int:
    """Layers between a block and the head. A block without parameters is in the layer of the block before it."""
    known = blocks[index].distances
    if known is None:
        return len(blocks) - 1 - index
    return min(known.values(), default=_nearest(blocks, index - 1) if index else 0)


def _first_trained(spec: Stage, index: int, chain: HasBlocks) -> int:
    """Index of the first block that a stage trains. Raises UserError for a name that is another network's, with the setting to change."""
    try:
        return chain.index(spec.unfreeze)
    except UserError as error:
        raise UserError(
            f"stage {spec.name}: {error}. Name one of them with --stages.{index}.unfreeze, or auto to let a race choose"
        ) from error


def _check_carry(spec: Stage, index: int, pretrained: bool, has_val: bool) -> None:
    """Raise UserError where a stage cannot hand on what it should. pretrained: by the first stage, which learns no labels."""
    needs_val = f"carry: {spec.carry}" if spec.carry in ("best", "blend") else "patience" if spec.patience else None
    if needs_val and not has_val:
        remedy = "set data.val_fraction above 0, or carry: last without patience"
        raise UserError(f"stage {spec.name} has {needs_val} and there is no val split; {remedy}")
    if spec.carry == "ema" and spec.ema is None:
        raise UserError(f"stage {spec.name} has carry: ema and ema is null, so that there is no average; set ema, such as 0.999")
    if spec.carry == "blend" and index == int(pretrained):
        told = f"stage {spec.name} has carry: blend and is the first{' with labels' * pretrained}, which starts from a new head of zeros"
        raise UserError(f"{told}: a blend would only shrink its answers; train the head in a stage before it, or carry: best")


def plan(
    recipe: Recipe, chain: HasBlocks, num_samples: int, has_val: bool, num_labelled: int | None = None,
    features: TaughtFeatures | None = None,
) -> tuple[StagePlan, ...]:  # fmt: skip
    """The resolved stages of a run on `num_samples` training images. Raises UserError for an unknown block, and where val is needed
    and there is none.

    num_labelled: those with a label; None: all. features: what the first stage learns, where the recipe says that it learns features.
    """
    stages: list[StagePlan] = []
    first_step = first_epoch = 0
    for index, spec in enumerate(recipe.stages):
        pretrains = recipe.matches_features and index == 0
        taught = pretrains or not recipe.matches_features
        _check_carry(spec, index, recipe.matches_features, has_val)
        if spec.solve:  # one step, from the evaluation view unless the recipe says how many
            spec = spec.model_copy(update={"steps": 1, "views": spec.views or 1})
        num = num_samples if taught or num_labelled is None else num_labelled
        num_steps = spec.steps or math.ceil((spec.epochs or 0) * num / recipe.batch - 1e-9)
        lr_scales = scales(chain.blocks, _first_trained(spec, index, chain), spec.layer_decay)
        if pretrains and not any(lr_scales[:-1]):
            told = f"stage {spec.name} learns the teacher's features, and with unfreeze: {spec.unfreeze} no block below the head would"
            raise UserError(f"{told}: the linear map in place of the head is not handed on; unfreeze more, such as all")
        where = (lr_scales, num_steps, num, recipe.batch, first_step, first_epoch)
        first = next(i for i, scale in enumerate(lr_scales) if scale > 0)
        moved = any(any(before.scales[:first]) for before in stages)
        stages.append(StagePlan(index, spec, *where, taught, features if pretrains else None, moved=moved))
        first_step += num_steps
        first_epoch += math.ceil(stages[-1].num_reads / num)
    return tuple(stages)
