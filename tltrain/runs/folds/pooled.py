"""What the runs of a cross-validation say together: every image, predicted once a repeat by a network that never saw it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.runs.folds import folder, labels
from tltrain.runs.folds.folder import FoldsFolder, Member
from tltrain.runs.record import RunRecord, number, prediction_rows, probability_columns, read_run
from tltrain.runs.report.formatting import finished_of
from tltrain.runs.report.stats import Interval, accuracy_interval, f1_interval

MOST_MISTAKES = 24


@dataclass(frozen=True)
class OutOfFold:
    """The predictions of all repeats, image by image. An image that a repeat did not predict has -1 there."""

    ids: tuple[str, ...]
    """(N,), sorted."""
    label: np.ndarray
    """(N,) int64."""
    predicted: np.ndarray
    """(R, N) int64."""
    confidence: np.ndarray
    """(R, N) float64, calibrated by the val split of the fold."""
    fold: np.ndarray
    """(R, N) int64: the fold whose network was tested on the image."""
    group: np.ndarray | None = None
    """(N,) int64: the group of each image, such as those of one patient. None: each stands alone."""

    @property
    def right(self) -> np.ndarray:
        """(N,) float64: the share of the repeats that are right about an image, of those that predicted it."""
        there_RN = self.fold >= 0
        return ((self.predicted == self.label) & there_RN).sum(0) / there_RN.sum(0)


@dataclass(frozen=True)
class Pooled:
    """The runs of a folder that have been tested, and their figures together."""

    folder: FoldsFolder
    runs: Sequence[tuple[Member, RunRecord]]
    predictions: OutOfFold
    record: RunRecord
    """As that of one run. In its test figures `n` counts images; confusion and reliability count every prediction."""
    accuracy: Interval
    """Of several labels: of images with all labels right."""
    f1: Interval
    names: Sequence[str]
    """What `predictions` numbers: the classes, or of several labels the sets of them that occur."""

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return "per_label" in (self.record.test or {})

    @property
    def is_whole(self) -> bool:
        """Whether every run that was asked for has been tested."""
        return len(self.runs) == len(self.folder.members)

    @property
    def accuracies(self) -> np.ndarray:
        """(n,) test accuracy of each run, which was measured on its own fold; of several labels mAP."""
        return np.array([number(run.test or {}, "map" if self.several else "top1") for _, run in self.runs])

    @property
    def spread(self) -> float:
        """Standard deviation of `accuracies`; NaN for one run."""
        return float(self.accuracies.std(ddof=1)) if len(self.runs) > 1 else math.nan

    @property
    def by_repeat(self) -> dict[int, float]:
        """Accuracy of each repeat over all of its images."""
        p = self.predictions
        there = {r: p.fold[r] >= 0 for r in range(len(p.fold))}
        return {r: float((p.predicted[r] == p.label)[mask].mean()) for r, mask in there.items() if mask.any()}


def pool(path: Path) -> Pooled | None:
    """Read the tested runs of a folder. None if there is none yet.

    Raises UserError for a damaged folder, and for runs whose images or classes are not those of one data set.
    """
    what = folder.read(path)
    runs = [(member, read_run(member.path)) for member in what.members if member.path.is_dir()]
    tested = [(member, run) for member, run in runs if run.test is not None]
    if not tested:
        return None
    classes = tested[0][1].test["classes"]  # type: ignore[index]
    for member, run in tested:
        if (run.test or {})["classes"] != classes:
            raise UserError(
                f"{member.path} and {tested[0][0].path} have other classes, so that they cannot be pooled; train one of them again"
            )
    members, tests = [member for member, _ in tested], [run.test for _, run in tested if run.test is not None]
    several = "per_label" in tests[0]
    rows = {member: prediction_rows(member.path, probability_columns(classes) if several else ()) for member in members}
    names = sorted({row[key] for of in rows.values() for row in of for key in ("label", "predicted")}) if several else classes
    p = _predictions(what, rows, names)
    accuracy = accuracy_interval(p.right, p.group)
    if several:
        answers = labels.pooled([row for of in rows.values() for row in of], tests, p.ids, p.group)
        figures = labels.figures(answers, tests, len(p.ids), accuracy.value)
        f1 = Interval(number(figures, "f1_macro"), *figures["intervals"].get("f1_macro", (math.nan, math.nan)))
    else:
        f1 = f1_interval(p.label, *p.predicted, group_N=p.group)
        figures = _figures(tested, p, accuracy.value, f1.value)
    return Pooled(what, tested, p, _record(what, tested, figures), accuracy, f1, names)


@dataclass(frozen=True)
class FoldsRecord(RunRecord):
    """The runs of a folder as if they were one, for pages: figures of all images, and steps and seconds of all runs."""

    steps: tuple[int, ...] = ()

    @cached_property
    def stage_steps(self) -> list[int]:
        """Optimizer steps taken in each stage, of all runs together."""
        return list(self.steps)


def _record(what: FoldsFolder, runs: Sequence[tuple[Member, RunRecord]], test: dict[str, Any]) -> FoldsRecord:
    first = runs[0][1]
    outcomes = [run.outcome or {} for _, run in runs]
    cost = {"seconds": sum(run.seconds for _, run in runs), "peak_bytes": max(number(outcome, "peak_bytes") for outcome in outcomes)}
    steps = tuple(map(sum, zip(*(run.stage_steps for _, run in runs), strict=True)))
    whole = len(runs) == len(what.members)
    state = "finished" if whole else finished_of(len(runs), len(what.members))
    own = {"path": what.path, "rows": (), "test": test, "mistakes": _mistakes(runs), "plan": "", "outcome": {"outcome": state, **cost}}
    kept = {field.name: getattr(first, field.name) for field in fields(RunRecord)}
    return FoldsRecord(**{**kept, **own, "right_answers": (), "preview": None}, steps=steps)


def _predictions(what: FoldsFolder, rows: Mapping[Member, Sequence[Mapping[str, str]]], classes: Sequence[str]) -> OutOfFold:
    number_of = {name: k for k, name in enumerate(classes)}
    label_of: dict[str, int] = {}
    group_of: dict[str, int] = {}
    for member, predicted in rows.items():
        for row in predicted:
            if "group" in row:
                group_of[row["id"]] = int(row["group"])
            if label_of.setdefault(row["id"], number_of[row["label"]]) != number_of[row["label"]]:
                raise UserError(f"{member.path}: {row['id']} has another class than in other folds; the labels were changed: begin anew")
    ids = tuple(sorted(label_of))
    at, shape = {name: i for i, name in enumerate(ids)}, (what.repeats, len(ids))
    predicted_RN, fold_RN, confidence_RN = np.full(shape, -1), np.full(shape, -1), np.full(shape, math.nan)
    for member, predicted in rows.items():
        for row in predicted:
            where = member.repeat, at[row["id"]]
            if fold_RN[where] >= 0:
                raise UserError(
                    f"{row['id']} is tested by fold {fold_RN[where]} and by fold {member.fold} of repeat {member.repeat}, so that one of "
                    "them has learned from it: their data are not the same; begin anew in another folder"
                )
            predicted_RN[where], fold_RN[where], confidence_RN[where] = number_of[row["predicted"]], member.fold, float(row["confidence"])
    label_N = np.array([label_of[name] for name in ids], dtype=np.int64)
    return OutOfFold(ids, label_N, predicted_RN, confidence_RN, fold_RN, _groups(ids, group_of))


def _groups(ids: Sequence[str], group_of: Mapping[str, int]) -> np.ndarray | None:
    """(N,) the group of each image. One without is alone: a fold in which nearly each image is a group writes none. None: no fold does."""
    if not group_of:
        return None
    first = max(group_of.values()) + 1
    return np.array([group_of.get(name, first + i) for i, name in enumerate(ids)], dtype=np.int64)


def _figures(runs: Sequence[tuple[Member, RunRecord]], p: OutOfFold, share: float, f1: float) -> dict[str, Any]:
    """The figures of one test of all images, from those of the folds."""
    tests = [run.test for _, run in runs if run.test is not None]
    n_F = np.array([test["n"] for test in tests], dtype=np.float64)
    confusion_KK = np.sum([np.array(test["confusion"]) for test in tests], axis=0)
    hit_K, true_K, said_K = np.diag(confusion_KK), confusion_KK.sum(1), confusion_KK.sum(0)
    images_K = np.bincount(p.label, minlength=len(confusion_KK))  # repeats of an image make it no second image
    columns = (tests[0]["classes"], hit_K.tolist(), true_K.tolist(), said_K.tolist(), images_K.tolist())
    per_class = [
        {"name": name, "precision": hit / max(said, 1), "recall": hit / max(true, 1), "f1": 2 * hit / max(true + said, 1), "support": num}
        for name, hit, true, said, num in zip(*columns, strict=True)
    ]

    def mean(key: str) -> float | None:
        values = [number(test, key) for test in tests]
        return float(np.dot(n_F, values) / n_F.sum()) if all(map(math.isfinite, values)) else None

    as_trained, calibrated = (_bins([of(test) for test in tests]) for of in (dict, lambda test: test["calibration"]))
    temperatures = [float(test["calibration"]["temperature"]) for test in tests]
    between = f"{min(temperatures):.2f} to {max(temperatures):.2f}"
    how = f"The logits of each run are divided by a temperature that was fitted on its own val split, {between}."
    return {
        "n": len(p.ids), "top1": share, "top5": mean("top5"), "loss": mean("loss"), "f1_macro": f1, "ece": _ece(as_trained),
        "classes": tests[0]["classes"], "per_class": per_class, "confusion": confusion_KK.tolist(), "reliability": as_trained,
        "calibration": {"temperature": float(np.median(temperatures)), "how": how, "ece": _ece(calibrated), "reliability": calibrated},
    }  # fmt: skip


def _bins(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The reliability of all predictions, from that of parts of them: the bins are the same, and their means are weighted."""
    found: dict[float, dict[str, float]] = {}
    for each in (b for part in parts for b in part["reliability"] if b["n"]):
        so_far = found.setdefault(each["low"], {"low": each["low"], "high": each["high"], "n": 0, "confidence": 0.0, "accuracy": 0.0})
        n = so_far["n"] + each["n"]
        for key in ("confidence", "accuracy"):
            so_far[key] += (each[key] - so_far[key]) * each["n"] / n
        so_far["n"] = n
    return [found[low] for low in sorted(found)]


def _ece(bins: Sequence[Mapping[str, float]]) -> float:
    """Expected calibration error of pooled bins."""
    return sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / sum(b["n"] for b in bins)


def _mistakes(runs: Sequence[tuple[Member, RunRecord]]) -> list[Mapping[str, Any]]:
    surest: dict[str, Mapping[str, Any]] = {}
    for mistake in sorted((m for _, run in runs for m in run.mistakes), key=lambda m: -float(m["confidence"])):
        surest.setdefault(str(mistake["id"]), mistake)
    return list(surest.values())[:MOST_MISTAKES]


def table(p: OutOfFold, classes: Sequence[str]) -> bytes:
    """out_of_fold.csv: a line for each image in each repeat."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "predicted", "confidence", "fold", "repeat"])
    for r, (predicted_N, confidence_N, fold_N) in enumerate(zip(p.predicted.tolist(), p.confidence, p.fold.tolist(), strict=True)):
        for name, label, predicted, confidence, fold in zip(p.ids, p.label.tolist(), predicted_N, confidence_N, fold_N, strict=True):
            if fold >= 0:
                names = map(escape.csv_cell, (name, classes[label], classes[predicted]))
                writer.writerow([*names, f"{confidence:.6f}", fold, r])
    return text.getvalue().encode("utf-8", "surrogateescape")
