"""Compares a finished student with its teacher: accuracy on the same test images, parameters, bytes, time per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logit, softmax

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
from tltrain.evaluation.evaluator import answers, logits
from tltrain.evaluation.multilabel.judged import by_answers
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.evaluation.trained import load_trained
from tltrain.fitting.timing import machine_of
from tltrain.models import factory
from tltrain.planning.compiling import forward_s
from tltrain.runs import run_dir
from tltrain.runs.pages import distilled
from tltrain.runs.pages.write import write_report
from tltrain.runs.record import LEAST, read_predictions
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
    """The accuracy of both, or of several labels their mAP, on the test images of the student, and the difference. Empty without a test."""
    own = read_predictions(run)
    if own is None or taught.images.test is None:
        return {}
    mine = own.answers_by_id
    theirs = _answers(taught.teachers, taught.images.test)
    if set(mine) != set(theirs):
        raise UserError(
            f"{run} was tested on other images than its teacher {taught.teachers[0].path}, so that nothing compares the two; "
            "delete the folder of the student, and distil anew"
        )
    ids = list(mine)
    group_N = None
    if own.group is not None:
        group_of = {name: group for (name, _), group in zip(own.samples, own.group.tolist(), strict=True)}
        group_N = np.array([group_of[name] for name in ids])
    student, teacher = (by_answers(np.array([said[name] for name in ids]), group_N) for said in (mine, theirs))
    figure = "top1" if own.labelled is None else "map"
    found = {f"student_{figure}": student.interval, f"teacher_{figure}": teacher.interval, "gain": student.lead(teacher)}
    return {"n": len(ids), **{name: list(interval) for name, interval in found.items()}}


def _answers(teachers: Sequence[Teacher], test: Split) -> Mapping[str, float | np.ndarray]:
    """Test image to the teacher's answer (`Predicted.answers_by_id`): of its run's own test; of several teachers, of their mean
    probabilities."""
    if len(teachers) == 1 and (kept := read_predictions(teachers[0].path)) is not None:
        return kept.answers_by_id
    p_NK = np.mean([_probabilities(each, test) for each in teachers], axis=0)
    if test.labels.ndim == 1:
        return dict(zip(test.ids, (p_NK.argmax(1) == test.labels).astype(float).tolist(), strict=True))
    return dict(zip(test.ids, np.stack([logit(p_NK.clip(LEAST, 1 - LEAST)), test.labels], 1), strict=True))


@torch_settings_kept()
def _probabilities(teacher: Teacher, test: Split) -> np.ndarray:
    """(N, K) of a run for the evaluation views of its own size."""
    runtime, trained = Runtime(teacher.recipe.deterministic), load_trained(teacher.path)
    views = Views(test, trained.preprocess, "none", teacher.recipe.data.flip, teacher.recipe.data.seed)
    loader = eval_loader(views, Shard(0, 1), DEVICE_BATCH, None, 0, runtime.device.type == "cuda")
    if test.labels.ndim == 2:
        said = answers(runtime, trained.placed, loader)
        assert isinstance(said, LabelPredictions)
        return said.calibrated
    logits_NK, _ = logits(runtime, trained.placed, loader)
    p_NK: np.ndarray = softmax(logits_NK, axis=1)
    return p_NK
