"""What a stage means: scales, parameter groups, schedule, steps. Pure functions of a recipe, a chain and the number of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe, Stage
from tltrain.models.chain import Chain, is_batch_norm


@dataclass(frozen=True)
class StagePlan:
    """One stage, resolved against a network and a data set."""

    index: int
    spec: Stage
    scales: tuple[float, ...]
    """Learning-rate scale of each block; 0 is frozen."""
    num_steps: int
    num_samples: int
    batch: int
    first_step: int
    """Optimizer steps of the run planned before this stage."""
    first_epoch: int
    """Epochs of the run planned before this stage, rounded up: where fresh views go on."""

    @property
    def first(self) -> int:
        """The first block that trains."""
        return next(i for i, scale in enumerate(self.scales) if scale > 0)

    @property
    def name(self) -> str:
        return f"{self.index}-{self.spec.name}"

    @property
    def log_steps(self) -> int:
        """Steps between two training rows: about a hundred rows a stage, wherever it is interrupted."""
        return max(1, math.ceil(self.num_steps / 100))

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step * self.batch / self.num_samples

    def lr_factor(self, step: int) -> float:
        """What each group's peak learning rate is multiplied by in step `step` (from 0)."""
        s = self.spec
        num_warmup = round(s.warmup * self.num_steps)
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        if s.schedule == "step":
            return float(s.step_gamma ** math.floor(self.epoch(step) / s.step_epochs + 1e-9))
        if s.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (self.num_steps - num_warmup)))
        return 1.0

    def evaluates_after(self, step: int) -> bool:
        """Whether val is evaluated once `step` steps are done: at the start, every eval_epochs, and at the end."""
        if step in (0, self.num_steps):
            return True
        period = self.spec.eval_epochs * self.num_samples
        return math.floor(step * self.batch / period + 1e-9) > math.floor((step - 1) * self.batch / period + 1e-9)


def scales(num_blocks: int, first: int, layer_decay: float) -> tuple[float, ...]:
    """Learning-rate scale of each block: 0 before `first`, then layer_decay ** (blocks between it and the head), as in BEiT and timm."""
    return tuple(layer_decay ** (num_blocks - 1 - i) if i >= first else 0.0 for i in range(num_blocks))


def plan(recipe: Recipe, chain: Chain, num_samples: int, has_val: bool) -> tuple[StagePlan, ...]:
    """The stages of a run on `num_samples` training images. Raises UserError for what cannot work."""
    planned: list[StagePlan] = []
    first_step = first_epoch = 0
    for index, spec in enumerate(recipe.stages):
        needs_val = "carry: best" if spec.carry == "best" else "patience" if spec.patience else None
        if needs_val and not has_val:
            remedy = "set data.val_fraction above 0, or carry: last without patience"
            raise UserError(f"stage {spec.name} has {needs_val} and there is no val split; {remedy}")
        num_steps = spec.steps or math.ceil((spec.epochs or 0) * num_samples / recipe.batch - 1e-9)
        lr_scales = scales(len(chain.blocks), chain.index(spec.unfreeze), spec.layer_decay)
        planned.append(StagePlan(index, spec, lr_scales, num_steps, num_samples, recipe.batch, first_step, first_epoch))
        first_step += num_steps
        first_epoch += math.ceil(num_steps * recipe.batch / num_samples)
    return tuple(planned)


def freeze(chain: Chain, stage: StagePlan) -> None:
    """Put the chain into the state of a stage: which blocks have gradients, which modules may change their statistics."""
    chain.freeze(stage.first, norm_stats=stage.spec.norm_stats == "train")


def parameter_groups(chain: Chain, stage: StagePlan) -> list[dict[str, Any]]:
    """Optimizer groups of what trains, each with `peak_lr` and a `name`: what decays and what does not, of each block, or of all blocks
    that have the same learning rate: an optimizer takes each group by itself, and small networks notice."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for i, scale in enumerate(stage.scales):
        if scale == 0:
            continue
        for name, parameter in chain.parameters_of(i):
            decays = stage.spec.weight_decay_on == "all" or (parameter.ndim > 1 and name.endswith("weight"))
            peak_lr, decay = stage.spec.lr * scale, stage.spec.weight_decay if decays else 0.0
            fresh = {"params": [], "lr": peak_lr, "peak_lr": peak_lr, "weight_decay": decay, "blocks": [], "kinds": []}
            group = groups.setdefault((peak_lr, decay), fresh)
            group["params"].append(parameter)
            group["blocks"].append(chain.blocks[i].name)
            group["kinds"].append("decay" if decays else "spared")
    for group in groups.values():
        blocks, kinds = group.pop("blocks"), set(group.pop("kinds"))
        where = blocks[0] if blocks[0] == blocks[-1] else f"{blocks[0]} to {blocks[-1]}"
        group["name"] = f"{where}/{kinds.pop() if len(kinds) == 1 else 'all'}"
    return list(groups.values())


def make_optimizer(groups: list[dict[str, Any]], spec: Stage) -> torch.optim.Optimizer:
    """A fresh optimizer over `groups`: a stage never inherits the state of the last one.

    Fused, one kernel for all parameters: on one CPU core a step of ResNet-18 took 9 ms with AdamW and not 71, 4 with SGD and not 11.
    """
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=spec.lr, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def state_bytes(chain: Chain, stage: StagePlan) -> int:
    """Bytes of optimizer state in fp32 over all processes: two moments for AdamW, one for SGD with momentum."""
    moments = 2 if stage.spec.optimizer == "adamw" else int(stage.spec.momentum > 0)
    return 4 * moments * trainable(chain, stage)


def trainable(chain: Chain, stage: StagePlan) -> int:
    """Number of parameters that train."""
    return sum(p.numel() for i, s in enumerate(stage.scales) if s > 0 for _, p in chain.parameters_of(i))


def trains_norm_stats(chain: Chain, stages: Sequence[StagePlan]) -> bool:
    """Whether any stage updates BatchNorm statistics, so that the result depends on which images share a forward pass."""
    return any(
        is_batch_norm(m)
        for stage in stages
        if stage.spec.norm_stats == "train"
        for i, s in enumerate(stage.scales)
        if s > 0
        for _, m in chain.modules_of(i)
    )
