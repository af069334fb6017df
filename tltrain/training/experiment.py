"""Assembles an experiment from a recipe: its images, its student and teacher networks, and its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.core import metric, stage_plan
from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone, Recipe
from tltrain.core.stage_plan import StagePlan, TaughtFeatures
from tltrain.data import DataSplits
from tltrain.data.loader import evaluated
from tltrain.data.views import PIXELS_VERSION
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.models import factory, weights
from tltrain.models.factory import Loaded
from tltrain.models.family import WeightsSource
from tltrain.runs import checkpoint, run_dir
from tltrain.training.losses import objective
from tltrain.training.losses.ensemble import ensemble
from tltrain.training.matching import grid
from tltrain.training.matching.features import feature_loss, taught_features
from tltrain.training.weights import solved, trained


@dataclass(frozen=True)
class Experiment:
    """A recipe with everything that it names: images, networks and the plan of its stages."""

    recipe: Recipe
    images: DataSplits
    student: Loaded
    teacher: Loaded | None
    """Frozen and in eval mode. None if the recipe does not distil, and where no stage that is still to come asks it."""
    plan: tuple[StagePlan, ...]

    @classmethod
    def open(
        cls, recipe: Recipe, images: DataSplits, sources: dict[str, WeightsSource] | None = None, asks_teacher: bool = True
    ) -> Experiment:
        """Load the networks with their weights. Raises UserError if the recipe cannot be trained on these images.

        sources: those of the weights that were opened before, by the names of `inputs`. They are taken out, so that they go when used.
        asks_teacher: whether a teacher is loaded.
        """
        return cls._with(recipe, images, *open_nets(recipe if asks_teacher else _without_teacher(recipe), images, sources))

    @classmethod
    def outline(cls, recipe: Recipe, images: DataSplits, say: Callable[[str], None] | None = None) -> Experiment:
        """Build the networks without weights, on the meta device. Raises UserError if the recipe cannot be trained on these images.

        say: receives a message if the teacher cannot be built. It is often still to be trained. None: do not build a teacher.
        """
        num_classes, data, teacher = len(images.classes), recipe.data, None
        student = factory.skeleton(recipe.backbone, num_classes, data.size, data.resize)
        if recipe.distill is not None and say is not None:
            view = student.preprocess
            try:
                teacher = _together(
                    [factory.skeleton(spec, num_classes, view.size, view.resize) for spec in recipe.distill.teachers], recipe
                )
            except UserError as error:
                say(f"teacher planned without it: {error}")
        return cls._with(recipe, images, student, teacher)

    @classmethod
    def _with(cls, recipe: Recipe, images: DataSplits, student: Loaded, teacher: Loaded | None) -> Experiment:
        features = taught_features(recipe, student, teacher)
        if teacher is not None and features is not None and features.side is not None:
            grid.teach(teacher.chain, features.side)
        plan = stage_plan.plan(recipe, student.chain, len(images.pool), images.val is not None, len(images.train), features)
        trained.check(student.chain, plan)
        solved.check(student.chain, plan)
        return cls(recipe, images, student, teacher, plan)


def open_nets(recipe: Recipe, images: DataSplits, sources: dict[str, WeightsSource] | None = None) -> tuple[Loaded, Loaded | None]:
    """Load the student with a new head for these classes, and the frozen teacher (None without distillation).

    sources: as in `Experiment.open`. Raises UserError.
    """
    data, sources = recipe.data, sources or {}
    student = factory.load(
        recipe.backbone, classes=images.classes, size=data.size, resize=data.resize, head="new", seed=recipe.seed,
        source=sources.pop(STUDENT, None),
    )  # fmt: skip
    if data.multilabel:
        student = replace(student, card=replace(student.card, thresholds=(0.5,) * len(images.classes)))
    if recipe.distill is None:
        return student, None
    view = student.preprocess
    teachers = [
        factory.load(
            spec, classes=images.classes, size=view.size, resize=view.resize, head="new" if recipe.matches_features else "keep",
            seed=recipe.seed, source=sources.pop(name, None),
        )
        for name, spec in inputs(recipe).items() if name != STUDENT
    ]  # fmt: skip
    pairs = zip(recipe.distill.teachers, teachers, strict=True)
    if other := [spec for spec, loaded in pairs if (loaded.card.thresholds is not None) != data.multilabel]:
        theirs, mine = ("one class", "several labels") if data.multilabel else ("several labels", "one class")
        raise UserError(f"the teacher {other[0].weights} names {theirs} an image, and this recipe {mine}; give another teacher")
    teacher = _together(teachers, recipe)
    teacher.chain.freeze(len(teacher.chain.blocks), norm_stats=False).eval()
    return student, teacher


MIXES_BY_VIEW = "mixes_by_view"
"""Key in env.json: whether finite views are mixed per view. Absent in runs of tltrain 0.1."""
TAUGHT = "taught_features"
"""Key in env.json: the numbers of `TaughtFeatures`. Absent where no stage learns features."""
STUDENT = "weights"
"""The name of the student's weights among `inputs`."""


def inputs(recipe: Recipe) -> dict[str, Backbone]:
    """The weights that a recipe starts from, by the names that messages and the run's record give them."""
    teachers = () if recipe.distill is None else recipe.distill.teachers
    return {STUDENT: recipe.backbone} | {"teacher" if k == 0 else f"teacher {k + 1}": spec for k, spec in enumerate(teachers)}


def _without_teacher(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"distill": None})


def asks_teacher(path: Path, recipe: Recipe, say: Callable[[str], None]) -> bool:
    """Whether a stage learns from the recipe's teacher where the run in this folder goes on: at its newest checkpoint that is whole.

    A teacher that is not asked again changes nothing of what is still to come. So it need not be there, and is neither opened nor compared
    with the one that the run began with, whose hash stays in the run's record. Where it is not asked, `say` receives a line about that.
    """
    if recipe.distill is None:
        return False
    num_taught = 1 if recipe.matches_features else len(recipe.stages)
    for kept in checkpoint.committed(run_dir.checkpoints(path)):
        if int(kept.name.split("-")[1]) < num_taught:  # the stage that goes on, as `checkpoint.save` names it
            break
        if checkpoint.verify(kept) is None:
            say("teacher not opened: the stages that learn from it are finished")
            return False
    return True


def open_weights(recipe: Recipe, asks_teacher: bool = True) -> dict[str, WeightsSource]:
    """The weights of `inputs`, without a teacher that is not asked. Raises UserError, for those of a teacher with their place in the
    recipe."""
    found: dict[str, WeightsSource] = {}
    for k, (name, spec) in enumerate(inputs(recipe if asks_teacher else _without_teacher(recipe)).items()):
        try:
            found[name] = weights.open_once(spec)
        except UserError as error:
            place = {0: "backbone.weights", 1: "distill.teacher.weights"}.get(k, f"distill.ensemble.{k - 2}")
            raise UserError(str(error).replace("backbone.weights", place, 1)) from error
    return found


def _together(teachers: list[Loaded], recipe: Recipe) -> Loaded:
    assert recipe.distill is not None
    return teachers[0] if len(teachers) == 1 else ensemble(teachers, recipe.distill.temperature)


def check_objective(recipe: Recipe, images: DataSplits, together: int) -> None:
    """Check that every loss and metric can be loaded, that each loss is per sample and has what it reads, and that `select` is meaningful
    for these classes. together: images in the micro-batches of all processes. Raises UserError.
    """
    num_classes, multilabel = len(images.classes), recipe.data.multilabel
    if recipe.select == "top5" and num_classes <= 5:
        raise UserError(f"select is top5, and there are only {num_classes} classes, so that it is always right; choose top1")
    if recipe.select not in (known := metric.of_data(multilabel)):
        what = "several labels an image; choose map" if multilabel else "one class an image; choose top1"
        raise UserError(f"select is {recipe.select}, which is no metric of {what}, or another of {', '.join(known)}")
    if multilabel and images.val is not None:
        _check_val_labels(recipe, images.val.labels)
    for name in dict.fromkeys(stage.loss for stage in recipe.stages):
        objective.label_loss(name, num_classes, multilabel)
    if recipe.matches_features:
        feature_loss(recipe)
    elif recipe.distill is not None:
        objective.check_distill_loss(recipe, num_classes, together)


def _check_val_labels(recipe: Recipe, label_NK: np.ndarray) -> None:
    """Raise UserError where `select` has no value on val, whatever a network says: no image there has a label, or each has each."""
    seen_NK = label_NK[evaluated(len(label_NK), recipe.data.eval_limit)]
    said = LabelPredictions(np.arange(len(seen_NK)), seen_NK > 0, np.zeros(seen_NK.shape))
    value = metric.metric(recipe.select).value(said, label_NK.shape[1])
    if value is None or np.isnan(value):
        what = "have none of the labels" if not seen_NK.any() else "have each label, or none of it, alike"
        raise UserError(
            f"select is {recipe.select}, which has no value on val: its {len(seen_NK):,} images {what}. Give val images with labels and "
            "without, set data.val_fraction: 0 to go without val, or take select: loss"
        )


def as_begun(experiment: Experiment, path: Path) -> Experiment:
    """The experiment with what its run has begun with: one of tltrain 0.1 mixes finite views anew in each step, and goes on so."""
    by_view = run_dir.kept(path).get(MIXES_BY_VIEW, False) or not checkpoint.committed(run_dir.checkpoints(path))
    plan = experiment.plan if by_view else tuple(replace(stage, mixes_anew=stage.mixes_by_view) for stage in experiment.plan)
    if experiment.teacher is None and (taught := run_dir.kept(path).get(TAUGHT)):  # what a teacher that is not opened again gave
        plan = tuple(replace(stage, features=stage.features and TaughtFeatures(*taught)) for stage in plan)
    return replace(experiment, plan=plan)


def began_with(plan: Sequence[StagePlan]) -> dict[str, Any]:
    """What `as_begun` and `check_pixels` ask of a run, to be kept in it."""
    began = {"pixels": PIXELS_VERSION, MIXES_BY_VIEW: not any(stage.mixes_anew for stage in plan)}
    taught = [astuple(stage.features) for stage in plan if stage.features is not None]
    return began | ({TAUGHT: taught[0]} if taught else {})


def check_pixels(path: Path, recipe: Recipe, began_with: dict[str, int]) -> None:
    """Raise UserError for a run that has begun with augmented views whose pixels are others by now. began_with: their versions then."""
    changed = {s.augment for s in recipe.stages if began_with.get(s.augment, 1) != PIXELS_VERSION.get(s.augment, 1)}
    if changed and checkpoint.committed(run_dir.checkpoints(path)):
        raise UserError(
            f"{path} began with another version of tltrain, whose views of augment: {', '.join(sorted(changed))} have other pixels; "
            "finish it with that version, or begin a new run with --folder"
        )
