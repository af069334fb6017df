"""`tltrain distil`: opens the teachers, chooses the student's recipe, prints its cost, trains it, and compares it with its teacher."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console, clock
from tltrain.distilling import memory
from tltrain.distilling.against import compare_with_teacher
from tltrain.distilling.choose import LEAST_STEPS, VIEWS, Length, Pace, answered_anew, draft, length
from tltrain.distilling.cost import pace_of, why_unstored
from tltrain.distilling.memory import Plan
from tltrain.distilling.student import Student, parameters_of, student_of
from tltrain.distilling.teachers import OWN_RUN, Taught, identity, opened
from tltrain.fitting import written
from tltrain.fitting.choose import Draft, batch_of
from tltrain.fitting.facts import facts_of
from tltrain.models import factory
from tltrain.runs.pages import distilled
from tltrain.training.run import train

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Wanted:
    """What a person asks for."""

    runs: tuple[Path, ...]
    """Finished runs, or the folder of `tltrain folds`."""
    to: str
    """The student: NAME, NAME=WEIGHTS, or weights that say what they are."""
    folder: Path
    minutes: float | None = None
    """Time that it may take, about. None: a patient run, however long it takes."""
    dry_run: bool = False


def folder_of(runs: Sequence[Path], to: str) -> Path:
    """Where a distillation is kept if nothing else is said: beside the run, such as runs/photos-to-resnet18."""
    first = runs[0].parent if runs[0].name == OWN_RUN else runs[0]
    name = first.name or first.resolve().name
    return Path("runs") / f"{name}-to-{_plain(Path(to.partition('=')[0]).stem) or 'student'}"


def distil(wanted: Wanted, start: RunFlags, console: Console) -> str:
    """Choose a student's recipe, and train it. Returns finished, stopped or failed; `finished` for a dry run. Raises UserError.

    The folder keeps the recipe with its reasons, and the run. The same call goes on from there.
    """
    began = clock()
    if wanted.minutes is not None and not (math.isfinite(wanted.minutes) and wanted.minutes > 0):
        raise UserError(f"--minutes is {wanted.minutes:g}; give the time that it may take, such as 30")
    asked = {"runs": [str(path) for path in wanted.runs], "to": wanted.to, "minutes": wanted.minutes}
    plan = memory.read(wanted.folder, asked)
    taught = opened(wanted.runs)
    if plan is None:
        plan = _planned(wanted, taught, start, console, began)
        memory.keep(wanted.folder, asked, plan)
    else:
        memory.check_taught(wanted.folder, plan, identity(taught))
    where = wanted.folder / RECIPE
    text = written.text(plan.draft, list(plan.head))
    written.check_unedited(where, [text])
    memory.write(where, text)
    for line in plan.lines:
        console.say(line)
    console.say(f"recipe  {where}", style="bold")
    if wanted.dry_run:
        console.say(f"train it: tltrain train {where}, or this command without --dry-run, which also sets it against its teacher")
        return "finished"
    run = wanted.folder / OWN_RUN
    outcome = str(train(plan.draft.recipe, replace(start, folder=run))["outcome"])
    if outcome == "finished":
        for line in distilled.lines(compare_with_teacher(run, taught, start)):
            console.say(line)
    return outcome


def _planned(wanted: Wanted, taught: Taught, start: RunFlags, console: Console, began: float) -> Plan:
    """Everything that is chosen before anything trains."""
    facts, student = facts_of(taught.data, taught.images), student_of(wanted.to, taught)
    console.say(f"data    {facts.line()}")
    for note in _notes(taught, student):
        console.say(f"note    {note}", style="yellow")

    def drafted(length: Length) -> Draft:
        name = _plain(wanted.folder.name) or "student"
        runs = [str(each.path) for each in taught.teachers]
        return draft(name, facts, taught.data, student, runs, taught.teachers[0].recipe.seed, length)

    longest = Length(VIEWS[0], LEAST_STEPS, 0.0, 0, 0.0, "")
    with console.doing("timing this machine", log=False):
        pace: Pace = pace_of(drafted(longest).recipe, taught.images, start)
    left_s = None if wanted.minutes is None else max(0.0, 60 * wanted.minutes - (clock() - began))
    chosen = length(pace, facts.train, batch_of(facts), left_s)
    if why_not := why_unstored(drafted(chosen).recipe, taught.images, start):
        chosen = answered_anew(chosen, pace, facts.train, batch_of(facts), left_s, why_not)
    final, time = drafted(chosen), "" if wanted.minutes is None else f", asked to take {wanted.minutes:g} min"
    head = (f"Chosen by tltrain distil for {student.spec.name or student.spec.weights} from {_names(taught)}{time}: {facts.line()}.",)
    return Plan(final.values, final.reasons, head, tuple(chosen.lines(facts.train)), identity(taught))


def _notes(taught: Taught, student: Student) -> list[str]:
    """Notes on the student for the user, before training."""
    teachers, size, resize = taught.teachers, student.data.get("size", taught.data.size), student.data.get("resize", taught.data.resize)
    notes = [] if student.pretrained else [f"the student's weights are {student.why}"]
    num = sum(
        parameters_of(factory.skeleton(each.recipe.backbone.model_copy(update={"weights": str(each.path)}), len(taught.images.classes),
                                       None, None).chain) for each in teachers
    )  # fmt: skip
    if student.parameters >= num:
        whose = "its teacher" if len(teachers) == 1 else "all its teachers together"
        notes.append(f"the student has {student.parameters:,} parameters and {whose} {num:,}: it is not the smaller network")
    card = factory.skeleton(student.spec, len(taught.images.classes), size, resize).card
    if other := [each for each in teachers if each.card.size != card.size]:
        notes.append(f"{other[0].path.name} learned at {other[0].card.size} px, and answers the student's views of {card.size} px")
    if taught.images.test is None:
        notes.append("there is no test split, so that the student is not set against its teacher by accuracy")
    return notes


def _names(taught: Taught) -> str:
    first, *others = taught.teachers
    return str(first.path) if not others else f"{first.path} and {len(others)} more"


def _plain(text: str) -> str:
    """A text as the name of a recipe."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")
