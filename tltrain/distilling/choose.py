"""Chooses a student's recipe: a pure function of the data, of the networks, and of what this machine can do in the time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tltrain.core.output.console import duration, size
from tltrain.core.recipe import Data
from tltrain.distilling.student import Student
from tltrain.fitting.choose import JUDGES, WRITTEN, Draft, batch_of
from tltrain.fitting.facts import Facts

STAGE = "patient"
EPOCHS = ((2_000, 300.0), (20_000, 100.0), (10**12, 50.0))
"""(fewer training images than this, passes over them) where no time is given."""
LEAST_STEPS = 1_000
"""Steps where no time is given: fewer leave a student half trained, however small the data."""
VIEWS = (64, 32, 16, 8, 4, 2)
"""Stored views of each image that are tried, the most first."""
ANSWERS_SHARE = 0.25
"""Largest share of the time that computing the teacher's logits may take. The student trains in the rest."""
RATES = {(False, False): 3e-3, (False, True): 1e-3, (True, False): 3e-4, (True, True): 1e-4}
"""(pretrained, transformer) to the peak learning rate of AdamW."""
TEMPERATURE, WEIGHT = 4.0, 0.9
LARGE = 64
"""Pixels of a picture's shorter side below which crops of a part of it show too little."""
EVALUATIONS = 20


@dataclass(frozen=True)
class Pace:
    """Speed of this machine for this student and teacher, timed before training."""

    answer_s: float
    """Seconds per view: augmentation and the teachers' forward passes."""
    answer_bytes: int
    """Bytes of one view's stored logits."""
    step_s: float
    """Seconds of an optimizer step of the student, its share of evaluations included."""
    rest_s: float
    """Seconds after the stage: calibration and test."""
    room_bytes: int
    """Bytes that stores may use on the disk."""


@dataclass(frozen=True)
class Length:
    """Length of the student's training, number of views per image, and the reasons."""

    views: int
    steps: int
    answers_s: float
    """Total seconds of the teachers' forward passes."""
    answers_bytes: int
    total_s: float
    why: str
    unstored: str = ""
    """Why the answers are not stored. Empty where they are."""

    def lines(self, num_train: int) -> list[str]:
        """The cost as lines for the terminal."""
        views = f"{self.views} views of {num_train:,} images"
        store = f"the teacher's answers: {views} = {size(self.answers_bytes)}, {duration(self.answers_s)} to make, once, "
        store += "however long the student learns"
        if self.unstored:
            store = f"the teacher's answers to {views} are not stored ({self.unstored}): it answers in each step"
        took = "the teacher's answers" if self.unstored else "the teacher's pass"
        return [
            f"store   {store}",
            f"time    {self.steps:,} steps, about {duration(self.total_s)} with {took}, by forward passes timed here",
        ]


def length(pace: Pace, num_train: int, batch: int, left_s: float | None) -> Length:
    """The number of views and steps that fit into `left_s` seconds. None: those of a long run, by EPOCHS.

    The largest number of VIEWS whose logits the teacher computes in ANSWERS_SHARE of the time, which fit on the disk, and which the student
    sees at least once each. The student always trains for at least one epoch.
    """
    one_pass = math.ceil(num_train / batch)
    for views in VIEWS:
        answers_s, answers_bytes = views * num_train * pace.answer_s, views * num_train * pace.answer_bytes
        if left_s is None:
            passes = next(passes for most, passes in EPOCHS if num_train < most)
            steps = max(LEAST_STEPS, math.ceil(passes * num_train / batch))
        else:
            steps = max(one_pass, math.floor((left_s - pace.rest_s - answers_s) / max(pace.step_s, 1e-9)))
        in_time = left_s is None or answers_s <= ANSWERS_SHARE * (left_s - pace.rest_s)
        if in_time and answers_bytes <= pace.room_bytes and views <= steps / one_pass:
            break
    epochs = steps * batch / num_train
    total_s = answers_s + steps * pace.step_s + pace.rest_s
    why = f"{_epochs(epochs)}: patience pays (Beyer et al. 2022), and the stored answers cost nothing more"
    return Length(views, steps, answers_s, answers_bytes, total_s, why + _in_time(total_s, left_s))


def answered_anew(length: Length, pace: Pace, num_train: int, batch: int, left_s: float | None, why_not: str) -> Length:
    """The length of a run whose teacher runs in each step. length: of the same run with stored logits. why_not: why none are stored."""
    steps, step_s = length.steps, pace.step_s + batch * pace.answer_s
    if left_s is not None:
        steps = max(math.ceil(num_train / batch), math.floor((left_s - pace.rest_s) / max(step_s, 1e-9)))
    answers_s, total_s = steps * batch * pace.answer_s, steps * step_s + pace.rest_s
    why = f"{_epochs(steps * batch / num_train)}: patience pays (Beyer et al. 2022)" + _in_time(total_s, left_s)
    return Length(length.views, steps, answers_s, 0, total_s, why, why_not)


def _epochs(epochs: float) -> str:
    return f"{epochs:.0f} epoch{'s' * (round(epochs) != 1)}"


def _in_time(total_s: float, left_s: float | None) -> str:
    """The end of the sentence on the length."""
    if left_s is None:
        return f"; about {duration(total_s)} here; --minutes gives it more or less"
    if total_s > left_s:
        return f"; even one pass takes about {duration(total_s)}, and {duration(left_s)} were left of --minutes"
    return f"; what fits into the {duration(left_s)} that were left of --minutes"


def draft(name: str, facts: Facts, data: Data, student: Student, teachers: list[str], seed: int, length: Length) -> Draft:
    """The recipe of a student. teachers: their run folders. seed: of order and new weights."""
    batch, kind = batch_of(facts), "transformers" if student.transformer else "convolutions"
    distill: dict[str, Any] = {"teacher": {"weights": teachers[0]}}
    if len(teachers) > 1:
        distill["ensemble"] = teachers[1:]
    epochs = length.steps * batch / facts.train
    stage = {
        "name": STAGE, "unfreeze": "all", "steps": length.steps, "lr": RATES[student.pretrained, student.transformer], "weight_decay": 0.05,
        "warmup": 0.05, "augment": _augment(facts), "views": length.views, "norm_stats": "train",
        "eval_epochs": float(f"{max(1.0, epochs / EVALUATIONS):.3g}"), "carry": "best" if facts.val >= JUDGES else "last",
    }  # fmt: skip
    values = {
        "name": name, "purpose": f"Chosen by tltrain distil for {facts.source}"[:200], "seed": seed, "batch": batch,
        "data": {**_own_settings(data), **student.data},
        "backbone": {"name": student.spec.name, "weights": student.spec.weights},
        "distill": {**distill, "temperature": TEMPERATURE, "weight": WEIGHT}, **({"select": "map"} if facts.several else {}),
        "stages": [stage],
    }  # fmt: skip
    beginning = "pretrained" if student.pretrained else "new"
    reasons = {
        "batch": f"{facts.train:,} training images: small enough for many steps an epoch, large enough for the device to be busy",
        "data.seed": "the teacher's: with another, its training images would be among the student's test images",
        "data.size": student.why_size,
        "backbone.weights": student.why,
        "distill.ensemble": f"more teachers: the student learns the mean of {len(teachers)} softened answers" * (len(teachers) > 1),
        "distill.temperature": "softened, so that what the teacher holds for less likely is learned too (Hinton et al. 2015)",
        "distill.weight": "the teacher answers the view that the student sees; the label is of the whole image, and has the rest",
        "stages.0.steps": length.why,
        "stages.0.lr": f"usual for AdamW on {beginning} {kind}; not searched",
        "stages.0.warmup": "the teacher's first gradients are large",
        "stages.0.augment": _why_augment(facts),
        "stages.0.views": _why_views(length, max(1, round(epochs / length.views))),
        "stages.0.norm_stats": "the student's statistics follow these images",
        "stages.0.carry": f"{facts.val:,} val images " + ("choose the best weights" if facts.val >= JUDGES else "are too few to choose by"),
    }  # fmt: skip
    return Draft(values, {path: reason for path, reason in reasons.items() if reason})


def _why_views(length: Length, num: int) -> str:
    """num: how often the student sees each."""
    seen = "once" if num == 1 else f"{num:,} times"
    if length.unstored:
        return f"each view is seen {seen}; the teacher's answers are not stored: {length.unstored}"
    return f"the teacher's answers to {length.views} views of each image are stored, {size(length.answers_bytes)}; each is seen {seen}"


def _own_settings(data: Data) -> dict[str, Any]:
    """The recipe's data settings that differ from the defaults, and its data.seed."""
    own = data.model_dump(mode="json", exclude_defaults=True)
    return {"source": own.pop("source"), "seed": data.seed, **{key: value for key, value in own.items() if key != "seed"}}


def _augment(facts: Facts) -> str:
    return "light" if facts.source in WRITTEN or facts.side < LARGE else "strong"


def _why_augment(facts: Facts) -> str:
    if _augment(facts) == "light":
        return "characters, and pictures this small, bear shifts alone"
    return "function matching wants views of many kinds; the teacher answers each as it is, so that no view has a wrong label"
