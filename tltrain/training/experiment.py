"""A recipe put together with its images, its networks and its stages. Whoever works with a recipe begins here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tltrain.core import metric, registry, stage_plan
from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits
from tltrain.models import factory
from tltrain.models.factory import Loaded
from tltrain.training.losses import objective


@dataclass(frozen=True)
class Experiment:
    """What a recipe stands for."""

    recipe: Recipe
    images: DataSplits
    student: Loaded
    teacher: Loaded | None
    """Frozen, in eval mode."""
    plan: tuple[StagePlan, ...]

    @classmethod
    def open(cls, recipe: Recipe, images: DataSplits) -> Experiment:
        """With weights. Raises UserError for what cannot work."""
        return cls._with(recipe, images, *open_nets(recipe, images))

    @classmethod
    def outline(cls, recipe: Recipe, images: DataSplits, say: Callable[[str], None] | None = None) -> Experiment:
        """Without weights: the networks have shapes alone. Raises UserError for what cannot work.

        say: told why there is no teacher, which is often still to be trained. None: no teacher is looked for.
        """
        num_classes, data, teacher = len(images.classes), recipe.data, None
        student = factory.skeleton(recipe.backbone, num_classes, data.size, data.resize)
        if recipe.distill is not None and say is not None:
            view = student.preprocess
            try:
                teacher = factory.skeleton(recipe.distill.teacher, num_classes, view.size, view.resize)
            except UserError as error:
                say(f"teacher planned without it: {error}")
        return cls._with(recipe, images, student, teacher)

    @classmethod
    def _with(cls, recipe: Recipe, images: DataSplits, student: Loaded, teacher: Loaded | None) -> Experiment:
        plan = stage_plan.plan(recipe, student.chain, len(images.train), images.val is not None)
        return cls(recipe, images, student, teacher, plan)


def open_nets(recipe: Recipe, images: DataSplits) -> tuple[Loaded, Loaded | None]:
    """The student with a new head for these classes, and the frozen teacher. Raises UserError."""
    data = recipe.data
    student = factory.load(recipe.backbone, classes=images.classes, size=data.size, resize=data.resize, head="new", seed=recipe.seed)
    if recipe.distill is None:
        return student, None
    view = student.preprocess
    spec = recipe.distill.teacher
    teacher = factory.load(spec, classes=images.classes, size=view.size, resize=view.resize, head="keep", seed=recipe.seed)
    teacher.chain.freeze(len(teacher.chain.blocks), norm_stats=False).eval()
    return student, teacher


def check_objective(recipe: Recipe, images: DataSplits) -> None:
    """Raise UserError where a loss or a metric cannot be had, a loss is none, or `select` says nothing of these classes."""
    num_classes = len(images.classes)
    if recipe.select == "top5" and num_classes <= 5:
        raise UserError(f"select is top5, and there are only {num_classes} classes, so that it is always right; choose top1")
    for name in registry.names("metrics"):
        metric.metric(name)
    for name in dict.fromkeys(stage.loss for stage in recipe.stages):
        objective.label_loss(name, num_classes)
    if recipe.distill is not None:
        objective.distill_loss(recipe.distill.loss, num_classes)
