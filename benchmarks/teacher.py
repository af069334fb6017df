"""A student with a stored teacher (four augmented views, store warm) against the same student alone, and with the teacher in the loop."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from benchmarks.contestants import ours
from benchmarks.timing import Aim, Case, Contestant, Lap, Result
from tltrain.core.recipe import Recipe, validate
from tltrain.models import factory

STUDENT, TEACHER, SIZE = "resnet-micro", "resnet-small", 32


def main(words: Sequence[str] | None = None) -> list[Result]:
    return timing.command(timing.parser("teacher", __doc__), _cases, words)


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="tltrain-teacher-") as folder:
        yield case(Path(folder), *((2, 4) if given.smoke else (40, 150)))


def recipes(teacher: Path, per_class: int, num_steps: int) -> tuple[Recipe, Recipe, Recipe]:
    """(the teacher's own, the student's alone, the student's with the teacher of that run folder)."""
    data = {"source": "digits", "size": SIZE, "resize": SIZE, "per_class": per_class, "flip": False, "val_fraction": 0, "test_fraction": 0}
    stage: dict[str, Any] = {"name": "all", "unfreeze": "all", "carry": "last", "norm_stats": "train"}
    base = {"batch": min(64, 10 * per_class), "data": data}
    taught = {**base, "backbone": {"name": TEACHER}, "stages": [{**stage, "steps": max(2, num_steps // 5), "lr": 3e-3, "views": 1}]}
    alone = {**base, "backbone": {"name": STUDENT}, "stages": [{**stage, "steps": num_steps, "lr": 5e-3, "views": 4, "augment": "light"}]}
    distilled = {**alone, "distill": {"teacher": {"weights": str(teacher)}, "weight": 0.7}}
    named = {"teacher": taught, "alone": alone, "distilled": distilled}
    own, student, with_teacher = (validate({"name": name, **raw}, name) for name, raw in named.items())
    return own, student, with_teacher


def case(folder: Path, per_class: int, num_steps: int) -> Case:
    """folder: for the teacher's run, which is trained here, and for the store."""
    cache = folder / "cache"
    own, student, distilled = recipes(folder / "teacher", per_class, num_steps)
    ours(own, "never", cache, folder / "teacher")

    def alone() -> Lap:
        done = ours(student, "always", cache)
        return Lap(done.stage_s, (done.loss,))

    def stored() -> Lap:
        done = ours(distilled, "always", cache)
        return Lap(done.stage_s, tuple(row["loss"] for row in done.train))

    def online() -> Lap:
        done = ours(distilled, "never", cache)
        return Lap(done.stage_s, tuple(row["loss"] for row in done.train))

    forward, training = _flops(own), 3 * _flops(student)
    return Case(
        title=f"{STUDENT} from {TEACHER}, 4 light views, whole stage, batch {distilled.batch}, {num_steps} steps",
        contestants=[
            Contestant("student alone", alone, learns="labels"),
            Contestant("teacher stored", stored, learns="labels and teacher"),
            Contestant("teacher in the loop", online, learns="labels and teacher"),
        ],
        measure="time",
        tolerance=0,
        bound=f"1; with the teacher in the loop {1 + forward / training:.2f} by FLOPs ({forward:.3g} an image, the student {training:.3g})",
        aim=Aim("teacher stored", "time", 1.05),
    )


def _flops(recipe: Recipe) -> int:
    """Of one image's forward pass."""
    chain = factory.skeleton(recipe.backbone, 10, SIZE, SIZE).chain
    with FlopCounterMode(display=False) as counter:
        chain(next(chain.parameters()).new_empty((1, 3, SIZE, SIZE)))
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
