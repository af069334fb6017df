"""The objective of a stage: label loss plus distillation, one value per sample.

The training loop sums these values, so that every sample has equal weight even if micro-batches or ranks are uneven.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tltrain.cache.frozen import TEACHER, FrozenModel
from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.data.views import Batch

LabelLoss = Callable[[Tensor, Tensor, float, Tensor | None], Tensor]
"""(logits (B, K), labels (B,), label smoothing, class weights (K,) or None) -> (B,). A recipe names one in stages.N.loss."""

DistillLoss = Callable[[Tensor, Tensor, float], Tensor]
"""(logits of the student (B, K), of the teacher (B, K), temperature) -> (B,). A recipe names one in distill.loss."""


def label_loss(name: str, num_classes: int) -> LabelLoss:
    """Load the loss named by stages.N.loss and try it on two samples. Raises UserError unless it returns one value per sample."""
    loss = cast(LabelLoss, registry.find("losses", name, f"a stage's loss is {name!r}"))
    _check_per_sample(name, loss(torch.zeros(2, num_classes), torch.tensor([0, num_classes - 1]), 0.0, None))
    return loss


def distill_loss(name: str, num_classes: int) -> DistillLoss:
    """Load the loss named by distill.loss and try it on two samples. Raises UserError unless it returns one value per sample."""
    loss = cast(DistillLoss, registry.find("distill_losses", name, f"distill.loss is {name!r}"))
    _check_per_sample(name, loss(torch.zeros(2, num_classes), torch.zeros(2, num_classes), 1.0))
    return loss


def _check_per_sample(name: str, loss: Tensor) -> None:
    if loss.shape != (2,):
        raise UserError(f"the loss {name} gives shape {tuple(loss.shape)} for two samples; it must give one value a sample, unreduced")


@dataclass(frozen=True)
class Distillation:
    """The distillation term: the student learns the outputs of a teacher in addition to the labels."""

    teacher: FrozenModel
    loss: DistillLoss
    temperature: float
    weight: float
    """Weight of this term in [0, 1]. The label loss has the rest."""


@dataclass(frozen=True)
class Objective:
    """The per-sample loss of one stage."""

    label_loss: LabelLoss
    smoothing: float
    class_weights_K: Tensor | None = None
    distillation: Distillation | None = None

    def __call__(self, logits_BK: Tensor, batch: Batch) -> Tensor:
        """Loss (B,) of logits (B, K) for a batch of (possibly mixed) images. Runs the teacher if the batch has no cached logits of it."""
        loss_B = self.label_loss(logits_BK, batch["label"], self.smoothing, self.class_weights_K)
        if "partner_label" in batch:
            other_B = self.label_loss(logits_BK, batch["partner_label"], self.smoothing, self.class_weights_K)
            loss_B = batch["lam"] * loss_B + (1 - batch["lam"]) * other_B
        if (taught := self.distillation) is not None:
            teacher_BK = batch[TEACHER] if TEACHER in batch else taught.teacher(batch["image"])
            distill_B = taught.loss(logits_BK, teacher_BK, taught.temperature)
            loss_B = (1 - taught.weight) * loss_B + taught.weight * distill_B
        return loss_B
