"""Times a student's steps and its teacher's forward passes on this machine, before training."""

from __future__ import annotations

from tltrain.cache.planner import survey
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import DataSplits
from tltrain.distilling.choose import Pace
from tltrain.fitting.timing import machine_of
from tltrain.planning.run_time import run_time
from tltrain.training.experiment import Experiment


def why_unstored(recipe: Recipe, images: DataSplits, start: RunFlags) -> str:
    """Why the run of a student's recipe would not store its teacher's answers. Empty where it would. Raises UserError."""
    problems: list[str] = []
    whole = Experiment.outline(recipe, images, problems.append)
    answers = survey(recipe, start, images, whole.student, whole.teacher, whole.plan, machine_of(images, start)).stages[0].teacher
    return "" if answers is None or answers.place is not None else answers.why_not


def pace_of(recipe: Recipe, images: DataSplits, start: RunFlags) -> Pace:
    """Time a student's recipe of one stage, without its weights. Raises UserError where a network cannot be built."""
    problems: list[str] = []
    whole, machine = Experiment.outline(recipe, images, problems.append), machine_of(images, start)
    if whole.teacher is None:
        raise UserError(f"the teacher cannot be built: {'; '.join(problems)}")
    alone = Experiment.outline(recipe.model_copy(update={"distill": None}), images)
    choices = survey(alone.recipe, start, images, alone.student, None, alone.plan, machine)
    expected = run_time(alone.recipe, images, alone.student, None, alone.plan, machine, choices)
    answers = survey(recipe, start, images, whole.student, whole.teacher, whole.plan, machine)
    logits = answers.stages[0].teacher
    assert expected is not None and logits is not None, "the images were opened, and the recipe has a teacher"  # noqa: PT018
    return Pace(
        logits.speed.total_s, logits.speed.row_bytes, expected.stages[0] / alone.plan[0].num_steps, expected.rest, answers.budget.disk
    )
