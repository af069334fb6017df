"""The objective of a stage that learns a teacher's features, and what both networks and the loss must be for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tltrain.cache.frozen import TEACHER, FrozenModel
from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone, Recipe
from tltrain.core.schema.taught import FEATURE_LOSSES
from tltrain.data.views import Batch
from tltrain.models.factory import Loaded
from tltrain.models.family import family_of
from tltrain.training.losses.distillation import DistillLoss
from tltrain.training.losses.objective import check_per_sample, find_distill_loss
from tltrain.training.weights.solved import linear_head


@dataclass(frozen=True)
class Matching:
    """The loss of each sample of a stage that learns features. Labels are not read."""

    teacher: FrozenModel
    """Gives features (B, D) of images."""
    loss: DistillLoss

    def __call__(self, mapped_BD: Tensor, batch: Batch) -> Tensor:
        """Loss (B,) of the student's mapped features. Runs the teacher if the batch has no cached features of it."""
        teacher_BD = batch[TEACHER] if TEACHER in batch else self.teacher(batch["image"])
        return self.loss.value(mapped_BD, teacher_BD)


def feature_loss(recipe: Recipe) -> DistillLoss:
    """The loss that a recipe with target: features names, tried on two samples. Raises UserError."""
    assert recipe.distill is not None
    name = recipe.distill.loss
    loss = find_distill_loss(name)
    if loss.reads != "features":
        told = f"distill.loss is {name}, which compares answers to classes, and distill.target is features"
        own = "" if name in registry.KINDS["distill_losses"] else ', or give it reads="features" (DistillLoss) in its package'
        raise UserError(f"{told}; take distill.loss: {' or '.join(FEATURE_LOSSES)}{own}")
    check_per_sample(name, loss.value(torch.ones(2, 3), torch.ones(2, 3)))
    return loss


def width_of(recipe: Recipe, student: Loaded, teacher: Loaded | None) -> int:
    """Numbers of the teacher's feature that a recipe's first stage learns. 0 where none does, and in a plan without its teacher.

    Raises UserError where the student or the teacher has no pooled features, or the teacher no weights.
    """
    if not recipe.matches_features:
        return 0
    assert recipe.distill is not None
    check_trained(recipe.distill.teacher)
    told = f"the student {student.card.name} learns a teacher's features (distill.target: features)"
    linear_head(student.chain, told, "name another backbone, or take distill.target: logits")
    if teacher is None:
        return 0
    told = f"the teacher {teacher.card.name} teaches its features (distill.target: features)"
    return linear_head(teacher.chain, told, "give another teacher, or take distill.target: logits")[1].in_features


def check_trained(spec: Backbone) -> None:
    """Raise UserError for a teacher with random weights, whose features say nothing of what images show."""
    if spec.weights is None and (spec.name is None or family_of(spec.name).weights_in(spec.name) is None):
        told = f"distill.teacher.weights is null, and a {spec.name} with random weights has no features worth learning"
        raise UserError(f"{told}; give weights, such as DEFAULT")
