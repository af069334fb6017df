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
from tltrain.core.stage_plan import TaughtFeatures
from tltrain.data.views import Batch
from tltrain.models.factory import Loaded
from tltrain.models.family import family_of
from tltrain.training.losses.distillation import DistillLoss
from tltrain.training.losses.objective import check_per_sample, find_distill_loss
from tltrain.training.matching import grid
from tltrain.training.weights.solved import linear_head


@dataclass(frozen=True)
class Matching:
    """The loss of each sample of a stage that learns features. Labels are not read."""

    teacher: FrozenModel
    """Gives features of images, (B, D), or (B, places, D) of a map."""
    loss: DistillLoss

    def __call__(self, mapped: Tensor, batch: Batch) -> Tensor:
        """Loss (B,) of the student's mapped features, the mean over the places of a map. Runs the teacher if the batch has no cached
        features of it."""
        features = batch[TEACHER] if TEACHER in batch else self.teacher(batch["image"])
        return self.loss.value(mapped.flatten(0, -2), features.flatten(0, -2)).view(len(mapped), -1).mean(1)


def feature_loss(recipe: Recipe) -> DistillLoss:
    """The loss that a recipe with target: features or tokens names, tried on two samples. Raises UserError."""
    assert recipe.distill is not None
    name = recipe.distill.loss
    loss = find_distill_loss(name)
    if loss.reads != "features":
        told = f"distill.loss is {name}, which compares answers to classes, and distill.target is {recipe.distill.target}"
        own = "" if name in registry.KINDS["distill_losses"] else ', or give it reads="features" (DistillLoss) in its package'
        raise UserError(f"{told}; take distill.loss: {' or '.join(FEATURE_LOSSES)}{own}")
    check_per_sample(name, loss.value(torch.ones(2, 3), torch.ones(2, 3)))
    return loss


def taught_features(recipe: Recipe, student: Loaded, teacher: Loaded | None) -> TaughtFeatures | None:
    """What the first stage of a recipe learns of a teacher's features. None where it learns labels. teacher: None in a plan without it.

    Raises UserError where the student or the teacher has no such features, or the teacher no weights.
    """
    if not recipe.matches_features:
        return None
    assert recipe.distill is not None
    check_trained(recipe.distill.teacher)
    read = _pooled if recipe.distill.target == "features" else _map
    told = f"a teacher's features (distill.target: {recipe.distill.target})"
    told, remedy = f"the student {student.card.name} learns {told}", "name another backbone"
    num_in, side = read(student, told, remedy)
    if side is not None:  # its map passes the head's block in place of one vector
        linear_head(student.chain, told, remedy, (side**2,))
    if teacher is None:
        return TaughtFeatures(num_in, 0, side and 0)
    told = f"the teacher {teacher.card.name} teaches its features (distill.target: {recipe.distill.target})"
    num_out, theirs = read(teacher, told, "give another teacher")
    return TaughtFeatures(num_in, num_out, None if side is None or theirs is None else min(side, theirs))


def _pooled(loaded: Loaded, told: str, remedy: str) -> tuple[int, None]:
    """Numbers of the vector that the head of a network reads, and no grid. Raises UserError."""
    return linear_head(loaded.chain, told, f"{remedy}, or take distill.target: logits")[1].in_features, None


def _map(loaded: Loaded, told: str, remedy: str) -> tuple[int, int]:
    """(channels, places each way) of a network's last map. Raises UserError."""
    if (found := grid.shape_of(loaded)) is None:
        size = loaded.preprocess.size
        why = f"cannot be cut: {why_whole}" if (why_whole := loaded.chain.why_whole) else f"keeps no map of {size} px before its head"
        raise UserError(f"{told}, and this network {why}; {remedy}, or take distill.target: features or logits")
    side, channels = found
    return channels, side


def check_trained(spec: Backbone) -> None:
    """Raise UserError for a teacher with random weights, whose features say nothing of what images show."""
    if spec.weights is None and (spec.name is None or family_of(spec.name).weights_in(spec.name) is None):
        told = f"distill.teacher.weights is null, and a {spec.name} with random weights has no features worth learning"
        raise UserError(f"{told}; give weights, such as DEFAULT")
