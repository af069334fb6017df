"""Compares a finished student with its teacher: accuracy on the same test images, parameters, bytes, time per image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from tltrain.cache.measure import timed
from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import DataSplits, Split
from tltrain.data.loader import eval_loader
from tltrain.data.sampler import Shard
from tltrain.data.views import Views
from tltrain.distilling.student import parameters_of
from tltrain.distilling.teachers import Taught, Teacher
from tltrain.distributed.runtime import Runtime, torch_settings_kept
from tltrain.evaluation.evaluator import logits
from tltrain.evaluation.trained import load_trained
from tltrain.fitting.timing import machine_of
from tltrain.models import factory
from tltrain.planning.compiling import forward_s
from tltrain.runs import run_dir
from tltrain.runs.pages import distilled
from tltrain.runs.pages.write import write_report
from tltrain.runs.record import read_predictions
from tltrain.runs.report.stats import accuracy_interval, gain_interval
from tltrain.training.setup import DEVICE_BATCH


def compare_with_teacher(run: Path, taught: Taught, start: RunFlags) -> dict[str, Any]:
    """The contents of `distilled.json` in the student's run. Written once, together with the report that shows it. Raises UserError."""
    known = distilled.read(run)
    if known is not None:
        return known
    student = _costs([(run, run_dir.read_recipe(run))], taught.images, start)
    teacher = _costs([(each.path, each.recipe) for each in taught.teachers], taught.images, start)
    found = {"student": student, "teacher": teacher, "runs": [str(each.path) for each in taught.teachers], **_accuracy(run, taught)}
    try:
        files.write_json(run / distilled.NAME, found)
    except OSError as error:
        raise UserError(f"{run} cannot be written: {error}") from error
    write_report(run)
    return found


def _costs(runs: Sequence[tuple[Path, Recipe]], images: DataSplits, start: RunFlags) -> dict[str, Any]:
    """Parameters, bytes on the disk and ms per image, summed over networks that all predict every image."""
    machine, parameters, num_bytes, seconds = machine_of(images, start), 0, 0, 0.0
    for path, recipe in runs:
        spec = recipe.backbone.model_copy(update={"weights": str(path)})
        outline = factory.skeleton(spec, len(images.classes), None, None)
        parameters += parameters_of(outline.chain)
        num_bytes += run_dir.weights_file(path).stat().st_size
        seconds += forward_s(timed(outline.chain, machine.device), None, outline.preprocess.size, machine)
    return {"parameters": parameters, "bytes": num_bytes, "ms": 1000 * seconds, "device": machine.device.type}


def _accuracy(run: Path, taught: Taught) -> dict[str, Any]:
    """The accuracy of both on the test images that the student was tested on, and the difference. Empty without a test."""
    own = read_predictions(run)
    if own is None or taught.images.test is None:
        return {}
    mine = own.right_by_id
    theirs = _right(taught.teachers, taught.images.test)
    if set(mine) != set(theirs):
        raise UserError(
            f"{run} was tested on other images than its teacher {taught.teachers[0].path}, so that nothing compares the two; "
            "delete the folder of the student, and distil anew"
        )
    ids = list(mine)
    mine_N, theirs_N = (np.array([right[name] for name in ids]) for right in (mine, theirs))
    group_N = None
    if own.group is not None:
        group_of = {name: group for (name, _), group in zip(own.samples, own.group.tolist(), strict=True)}
        group_N = np.array([group_of[name] for name in ids])
    shares = {"student_top1": accuracy_interval(mine_N > 0, group_N), "teacher_top1": accuracy_interval(theirs_N > 0, group_N)}
    gain = gain_interval(theirs_N > 0, mine_N > 0, group_N)
    return {"n": len(ids), **{name: list(interval) for name, interval in (*shares.items(), ("gain", gain))}}


def _right(teachers: Sequence[Teacher], test: Split) -> dict[str, float]:
    """Test image to 1.0 where the teacher is right, else 0.0: by its run's own test; for several, by the mean of their probabilities."""
    if len(teachers) == 1 and (kept := read_predictions(teachers[0].path)) is not None:
        return kept.right_by_id
    predicted_N = sum(_probabilities(each, test) for each in teachers).argmax(1)  # type: ignore[union-attr]
    return dict(zip(test.ids, (predicted_N == test.labels).astype(float).tolist(), strict=True))


@torch_settings_kept()
def _probabilities(teacher: Teacher, test: Split) -> np.ndarray:
    """(N, K) of a run for the evaluation views of its own size."""
    runtime, trained = Runtime(teacher.recipe.deterministic), load_trained(teacher.path)
    views = Views(test, trained.preprocess, "none", teacher.recipe.data.flip, teacher.recipe.data.seed)
    loader = eval_loader(views, Shard(0, 1), DEVICE_BATCH, None, 0, runtime.device.type == "cuda")
    logits_NK, _ = logits(runtime, trained.placed, loader)
    p_NK: np.ndarray = softmax(logits_NK, axis=1)
    return p_NK
