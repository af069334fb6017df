"""The objective of a stage: label loss plus distillation, one value per sample.

The training loop sums these values, so that every sample has equal weight even if micro-batches or ranks are uneven.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tltrain.cache.frozen import MOST_CLASSES, TEACHER, FrozenModel
from tltrain.cache.planner import LOGITS
from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.core.recipe import DISTILL_LOSS, Distill, Recipe
from tltrain.data.dataset import NO_LABEL
from tltrain.data.views import Batch
from tltrain.training.losses.binary import binary_distillation
from tltrain.training.losses.distillation import DistillLoss
from tltrain.training.losses.over_batch import Together

LabelLoss = Callable[[Tensor, Tensor, float, Tensor | None], Tensor]
"""(logits (B, K), labels (B,), label smoothing, class weights (K,) or None) -> (B,). A recipe names one in stages.N.loss.

Of several labels (data.label_separator) it is given labels (B, K) uint8, 1 where an image has a class, and class weights (2, K) or None."""


def label_loss(name: str, num_classes: int, multilabel: bool = False) -> LabelLoss:
    """Load the loss named by stages.N.loss and try it on two samples. Raises UserError unless it returns one value per sample."""
    loss = cast(LabelLoss, registry.find("losses", name, f"a stage's loss is {name!r}"))
    if not multilabel:
        check_per_sample(name, loss(torch.zeros(2, num_classes), torch.tensor([0, num_classes - 1]), 0.0, None))
        return loss
    try:
        tried = loss(torch.zeros(2, num_classes), torch.eye(2, num_classes).byte(), 0.0, None)
    except Exception as error:  # another package's, which may know nothing but one class an image
        raise UserError(f"the loss {name} does not take several labels an image ({type(error).__name__}: {error}); leave it out") from error
    check_per_sample(name, tried)
    return loss


def find_distill_loss(name: str) -> DistillLoss:
    """The loss named by distill.loss. A plain function is one that reads logits alone. Raises UserError."""
    found = registry.find("distill_losses", name, f"distill.loss is {name!r}")
    return found if isinstance(found, DistillLoss) else DistillLoss(found)


def distill_loss(name: str, num_classes: int) -> DistillLoss:
    """Load the loss named by distill.loss and try it on two samples. Raises UserError unless it returns one value per sample."""
    loss = find_distill_loss(name)
    if loss.reads == "features":
        told = f"distill.loss is {name}, which compares features, and distill.target is logits"
        raise UserError(f"{told}; set distill.target: features, or take distill.loss: {DISTILL_LOSS}")
    more = {"labels": (torch.tensor([0, num_classes - 1]),), "batch": (torch.ones(2),)}.get(loss.reads, ())
    check_per_sample(name, loss(torch.zeros(2, num_classes), torch.zeros(2, num_classes), 1.0, *more))
    return loss


def check_distill_loss(recipe: Recipe, num_classes: int, together: int) -> None:
    """Check that the loss of a recipe's teacher can be loaded, and that its images have what it reads. Raises UserError.

    together: images in the micro-batches of all processes.
    """
    assert recipe.distill is not None
    name = recipe.distill.loss
    reads = distill_loss(name, num_classes).reads
    _check_top_k(recipe.distill, reads, num_classes)
    mixing = [(s.name, mix) for s in recipe.stages for mix in ("mixup", "cutmix") if getattr(s, mix)]
    if reads == "labels" and mixing:
        stage, mix = mixing[0]
        told = f"distill.loss is {name}, which reads the one label of an image, and stage {stage} has {mix}, whose images have two"
        raise UserError(f"{told}; set {mix}: 0, or take distill.loss: {DISTILL_LOSS}")
    if reads == "labels" and recipe.distill.unlabelled is not None:
        told = f"distill.loss is {name}, which reads labels, and the pictures of distill.unlabelled ({recipe.distill.unlabelled}) have none"
        raise UserError(f"{told}; take distill.loss: {DISTILL_LOSS}, or leave them out")
    if reads == "batch" and together < 2:
        told = f"distill.loss is {name}, which compares the images of a micro-batch, and one has {together}"
        raise UserError(f"{told}; raise batch or --max-device-batch, or take distill.loss: {DISTILL_LOSS}")


def _check_top_k(distill: Distill, reads: str, num_classes: int) -> None:
    """Raise UserError where the loss cannot do with some classes of the teacher's answers, or where no integer can name the classes."""
    if distill.top_k is None:
        return
    if reads != "probabilities":
        told = f"distill.loss is {distill.loss}, which needs the teacher's answer to every class, and distill.top_k keeps {distill.top_k}"
        raise UserError(f"{told}; leave top_k out, or take distill.loss: {DISTILL_LOSS}")
    most = MOST_CLASSES[LOGITS[distill.logits]]
    if num_classes > most:
        told = f"distill.top_k is {distill.top_k}, and with logits: {distill.logits} at most {most:,} classes have a number"
        raise UserError(f"{told}, not {num_classes:,}; set distill.logits: float32, or leave top_k out")


def check_per_sample(name: str, loss: Tensor) -> None:
    """Raise UserError unless a loss of two samples has one value for each."""
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
    together: Together
    """For a loss that reads the batch."""

    def __call__(self, logits_BK: Tensor, batch: Batch) -> Tensor:
        """The unweighted term (B,). Runs the teacher if the batch has no cached logits of it. Collective if the loss reads the batch."""
        teacher_BK = batch[TEACHER] if TEACHER in batch else self.teacher(batch["image"])
        if batch["label"].ndim == 2:  # of several labels, for which recipes take kd alone
            return binary_distillation(logits_BK, teacher_BK, self.temperature)
        if self.teacher.top_k is not None:
            logits_BK, teacher_BK = self.teacher.top_k.merge(logits_BK, teacher_BK)
        if self.loss.reads == "batch":
            return self.together(self.loss, logits_BK, teacher_BK, self.temperature, batch["weight"])
        more = (batch["label"],) if self.loss.reads == "labels" else ()
        return self.loss(logits_BK, teacher_BK, self.temperature, *more)


@dataclass(frozen=True)
class Objective:
    """The per-sample loss of one stage."""

    label_loss: LabelLoss
    smoothing: float
    class_weights_K: Tensor | None = None
    distillation: Distillation | None = None
    unlabelled: bool = False
    """Whether some images have no label (distill.unlabelled). To ask each of them takes five launches on a GPU."""

    def __call__(self, logits_BK: Tensor, batch: Batch) -> Tensor:
        """Loss (B,) of logits (B, K) for a batch of (possibly mixed) images."""
        loss_B = self._of_label(logits_BK, batch["label"])
        if "partner_label" in batch:
            other_B = self._of_label(logits_BK, batch["partner_label"])
            loss_B = batch["lam"] * loss_B + (1 - batch["lam"]) * other_B
        if (taught := self.distillation) is not None:
            loss_B = (1 - taught.weight) * loss_B + taught.weight * taught(logits_BK, batch)
        return loss_B

    def _of_label(self, logits_BK: Tensor, label_B: Tensor) -> Tensor:
        """The label loss (B,); 0 of a picture without a label."""
        if label_B.ndim == 2 or not self.unlabelled:  # no run of several labels has unlabelled pictures
            return self.label_loss(logits_BK, label_B, self.smoothing, self.class_weights_K)
        loss_B = self.label_loss(logits_BK, label_B.clamp_min(0), self.smoothing, self.class_weights_K)
        return torch.where(label_B == NO_LABEL, 0, loss_B)
