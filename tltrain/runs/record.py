"""Reads a run folder for reports. Files that a run has not written yet give None or an empty value."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.core import files, untrusted
from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import RACE, as_kept
from tltrain.runs import manifest, run_dir
from tltrain.runs.metrics_log import read_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """The contents of one run folder."""

    path: Path
    recipe: Recipe
    rows: Sequence[Row]
    test: Mapping[str, Any] | None
    mistakes: Sequence[Mapping[str, str | float]]
    right_answers: Sequence[Mapping[str, str | float]]
    outcome: Mapping[str, Any] | None
    env: Mapping[str, Any]
    plan: str
    preview: bytes | None = None
    """preview.png: training images as the network sees them."""

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def best(self) -> Row | None:
        """The row of val, or of a blend, of the best weights. Every improvement is marked when it is logged: the last one is the best."""
        return next((row for row in reversed(self.rows) if row["kind"] in ("val", "blend") and row.get("best")), None)

    @cached_property
    def stage_steps(self) -> list[int]:
        """Optimizer steps taken in each stage. A stage that ended early took fewer than planned."""
        steps = [0] * len(self.recipe.stages)
        for row in self.rows:
            if row["kind"] in ("train", "val", "stage_end"):
                steps[row["stage_index"]] = max(steps[row["stage_index"]], row["step"])
        return steps

    def at(self, row: Row) -> int:
        """Optimizer steps over all stages up to a row."""
        return sum(self.stage_steps[: row["stage_index"]]) + int(row["step"])

    @property
    def num_steps(self) -> int:
        return sum(self.stage_steps)

    @property
    def num_images(self) -> int:
        """Training images processed, repeats included. A solved head takes in each view once."""
        solved = self.of_kind("solve")
        return (self.num_steps - len(solved)) * self.recipe.batch + sum(int(row["features"]) for row in solved)

    @property
    def seconds(self) -> float:
        """Seconds of training over all starts, as last recorded; NaN if none is recorded."""
        for source in (self.test, self.outcome):
            if source is not None and math.isfinite(number(source, "seconds")):
                return number(source, "seconds")
        return max((number(row, "seconds") for row in self.of_kind("stage_end")), default=math.nan)


def read_run(path: Path) -> RunRecord:
    """Read a run folder. Raises UserError if `path` is not a run folder, or if one of its files is not valid."""
    manifest.check(run_dir.preview_file(path))
    return RunRecord(
        path=path,
        recipe=run_dir.read_recipe(path),
        rows=read_rows(path),
        test=run_dir.test_metrics(path),
        mistakes=run_dir.mistakes(path),
        right_answers=run_dir.right_answers(path),
        outcome=run_dir.outcome(path) or None,
        env=run_dir.environment(path),
        plan=run_dir.plan(path),
        preview=files.read_bytes(run_dir.preview_file(path)) if run_dir.preview_file(path).is_file() else None,
    )


@dataclass(frozen=True)
class Predicted:
    """A run's test predictions, in order of the samples' ids."""

    samples: tuple[tuple[str, str], ...]
    """(id, true class) of each sample. Runs with equal `samples` were tested on the same images."""
    label: np.ndarray
    """(N,) int64: index of the true class among the class names that occur, sorted."""
    predicted: np.ndarray
    """(N,) int64: index of the predicted class."""
    group: np.ndarray | None = None
    """(N,) int64: the group of each sample, such as those of one patient. None: each stands alone."""
    labelled: np.ndarray | None = None
    """(N, 2, K) of several labels an image: the logits, and 1 where it has a label. None: of one class."""

    @property
    def right(self) -> np.ndarray:
        """(N,) bool: whether the prediction is correct."""
        return self.label == self.predicted

    @property
    def right_by_id(self) -> dict[str, float]:
        """Sample to 1.0 where the prediction is correct, else 0.0."""
        return {name: float(is_right) for (name, _), is_right in zip(self.samples, self.right.tolist(), strict=True)}

    @property
    def answers_by_id(self) -> Mapping[str, float | np.ndarray]:
        """Sample to its answer: of several labels its row of `labelled`, else as `right_by_id`."""
        if self.labelled is None:
            return self.right_by_id
        return {name: answer for (name, _), answer in zip(self.samples, self.labelled, strict=True)}


def read_predictions(run: Path) -> Predicted | None:
    """The test predictions of a run; None if it has none."""
    if not run_dir.predictions_file(run).is_file():
        return None
    labels = [row["name"] for row in (run_dir.test_metrics(run) or {}).get("per_label", ())]
    rows = sorted(prediction_rows(run, probability_columns(labels)), key=lambda row: row["id"])
    names = {name: k for k, name in enumerate(sorted({row[key] for row in rows for key in ("label", "predicted")}))}
    label, predicted = (np.array([names[row[key]] for row in rows], dtype=np.int64) for key in ("label", "predicted"))
    labelled = np.stack(labels_in(rows, labels), 1) if labels else None
    return Predicted(tuple((row["id"], row["label"]) for row in rows), label, predicted, group_of(rows), labelled)


LEAST = 5e-7
"""Of a probability: files write six digits."""


def probability_columns(labels: Sequence[str]) -> list[str]:
    """The names of the columns of probabilities in test_predictions.csv, of several labels an image."""
    return [escape.csv_cell(f"p:{name}") for name in labels]


def labels_in(rows: Sequence[Mapping[str, str]], labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(logits (N, K), whether an image has a label (N, K)) of `prediction_rows` with `probability_columns`."""
    columns = probability_columns(labels)
    share_NK = np.array([[float(row[column]) for column in columns] for row in rows]).clip(LEAST, 1 - LEAST)
    return np.log(share_NK / (1 - share_NK)), np.array([has_labels(row["label"], labels) for row in rows])


def has_labels(text: str, labels: Sequence[str]) -> list[bool]:
    """Whether a set of labels, such as cat|dog, has each."""
    names = set(text.split("|")) if text else set()
    return [name in names for name in labels]


def group_of(rows: Sequence[Mapping[str, str]]) -> np.ndarray | None:
    """(N,) the group of each of `prediction_rows`. None where they have none."""
    return np.array([int(row["group"]) for row in rows], dtype=np.int64) if rows and "group" in rows[0] else None


def prediction_rows(run: Path, more: Sequence[str] = ()) -> list[dict[str, str]]:
    """The test predictions of a run as they were written: id, label, predicted, confidence, and for images in groups their group.

    more: names of further columns.

    Raises UserError, also where there are none.
    """
    path = run_dir.predictions_file(run)
    manifest.check(path)
    try:
        with io.TextIOWrapper(files.open_regular(path), encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            keys = ["id", "label", "predicted", "confidence", *more, *({"group"} & {*(reader.fieldnames or ())})]
            rows = [{key: escape.from_csv(row[key]) for key in keys} for row in reader]
            group_of(rows)
            return rows
    except (OSError, csv.Error, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); copy it from a backup, or delete it") from error


def write_race(run: Path, told: Mapping[str, str]) -> None:
    """Keep what the races of depths said, by stage. Raises UserError."""
    try:
        files.write_json(run / RACE, dict(told))
    except OSError as error:
        raise UserError(f"{run / RACE} cannot be written: {error}; choose another folder with --folder") from error


def as_chosen(recipe: Recipe, run: Path) -> Recipe:
    """The recipe with the depths that races have chosen for the run in this folder, if there is one. Raises UserError."""
    return as_kept(recipe, run_dir.read_recipe(run), read_race(run)) if run_dir.recipe_file(run).is_file() else recipe


def read_race(run: Path) -> dict[str, str]:
    """What the races of depths said, by stage. Empty where none was run. Raises UserError for a damaged file."""
    raw = untrusted.read_json(run / RACE) if (run / RACE).is_file() else {}
    if not isinstance(raw, dict):
        raise UserError(f"{run / RACE} is damaged; copy it from a backup, or delete it")
    return {str(stage): str(sentence) for stage, sentence in raw.items()}


def number(row: Mapping[str, Any], key: str) -> float:
    """A row's value as a float; NaN if it is missing."""
    value = row.get(key)
    return math.nan if value is None else float(value)
