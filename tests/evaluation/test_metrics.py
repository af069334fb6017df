"""Figures against scikit-learn on the raw predictions, and against values computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
)

from tltrain.core import metric, registry
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.evaluation import metrics
from tltrain.evaluation.metrics import Predictions
from tltrain.runs.metrics_log import read_rows
from tltrain.training.run import train


def made(n: int, num_classes: int, seed: int) -> Predictions:
    random = np.random.default_rng(seed)
    label, predicted = random.integers(0, num_classes, n), random.integers(0, num_classes, n)
    confidence, loss = random.uniform(1 / num_classes, 1, n), random.exponential(size=n)
    return Predictions(np.arange(n), label, predicted, confidence, loss, (label == predicted) | (random.random(n) < 0.3), confidence)


@pytest.mark.parametrize("num_classes", [2, 5, 10, 100])
@pytest.mark.parametrize("n", [1, 7, 200])
def test_summary_equals_scikit_learn(n: int, num_classes: int) -> None:
    p = made(n, num_classes, seed=n)
    out = metrics.summary(p, num_classes)
    assert out["n"] == n
    assert out["top1"] == accuracy_score(p.label, p.predicted)
    for average in ("macro", "weighted"):
        options = {"average": average, "zero_division": 0}
        assert out[f"precision_{average}"] == precision_score(p.label, p.predicted, **options)
        assert out[f"recall_{average}"] == recall_score(p.label, p.predicted, **options)
        assert out[f"f1_{average}"] == f1_score(p.label, p.predicted, **options)
    assert (out["top5"] is None) == (num_classes <= 5)


def test_a_summary_has_one_order_and_asks_scikit_learn_once_for_each_average(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(*arguments: Any, average: str, **options: Any) -> Any:
        asked.append(average)
        return precision_recall_fscore_support(*arguments, average=average, **options)

    monkeypatch.setattr(metrics, "precision_recall_fscore_support", counted)
    out = metrics.summary(made(30, 6, seed=1), 6)
    averages = [f"{figure}_{average}" for average in ("macro", "weighted") for figure in ("precision", "recall", "f1")]
    assert list(out) == ["n", "loss", "top1", "top5", *averages, "ece"], "as the rows of older runs have them"
    assert asked == ["macro", "weighted"]


def test_details_equal_scikit_learns_report_and_confusion_matrix() -> None:
    p, classes = made(300, 6, seed=3), tuple("abcdef")
    out = metrics.details(p, classes)
    report = classification_report(p.label, p.predicted, target_names=classes, output_dict=True, zero_division=0)
    for row in out["per_class"]:
        theirs = report[row["name"]]
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == (
            theirs["precision"], theirs["recall"], theirs["f1-score"], theirs["support"],
        )  # fmt: skip
    assert out["confusion"] == confusion_matrix(p.label, p.predicted, labels=range(6)).tolist()


def test_calibration_error_of_a_small_case_by_hand() -> None:
    # Two samples at confidence .9, one right: |.9 - .5| weighs 2/3. One at .35, wrong: |.35 - 0| weighs 1/3.
    confidence = np.array([0.9, 0.9, 0.35])
    p = Predictions(np.arange(3), np.array([0, 0, 1]), np.array([0, 1, 0]), confidence, np.zeros(3), np.zeros(3, bool), confidence)
    assert metrics.calibration_error(p) == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.35)
    assert [b["n"] for b in metrics.reliability(p)] == [1, 2]


def test_fifteen_bins_and_an_edge_belongs_to_the_lower_one_by_hand() -> None:
    # 0.4 is 6 / 15, in floats too, and shares (5/15, 6/15] with 0.35; 0.32 lies in (4/15, 5/15]. With ten bins all three were in one.
    confidence = np.array([0.4, 0.35, 0.32])
    assert confidence[0] * 15 == 6.0
    right, zeros = np.array([0, 1, 0]), np.zeros(3)
    p = Predictions(np.arange(3), np.zeros(3, np.int64), right, confidence, zeros, zeros.astype(bool), confidence)
    assert metrics.calibration_error(p) == pytest.approx(2 / 3 * abs(0.375 - 0.5) + 1 / 3 * (1 - 0.32))
    assert [(b["low"], b["high"], b["n"]) for b in metrics.reliability(p)] == [(4 / 15, 5 / 15, 1), (5 / 15, 6 / 15, 2)]
    edges = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    six = Predictions(np.arange(6), np.zeros(6, np.int64), np.zeros(6, np.int64), edges, np.zeros(6), np.zeros(6, bool), edges)
    assert [b["high"] for b in metrics.reliability(six)] == [1 / 15, 3 / 15, 6 / 15, 9 / 15, 12 / 15, 15 / 15]


def test_full_confidence_lies_in_the_last_bin() -> None:
    p = Predictions(np.arange(1), np.array([0]), np.array([0]), np.array([1.0]), np.zeros(1), np.ones(1, bool), np.array([1.0]))
    assert metrics.reliability(p)[0]["high"] == 1.0
    assert metrics.calibration_error(p) == 0.0


def test_only_strictly_better_counts() -> None:
    def better(value: float, best: float | None, select: str, loss: float = 1.0, best_loss: float | None = 1.0) -> bool:
        return metric.is_better({"loss": loss, select: value}, None if best is None else {"loss": best_loss, select: best}, select)

    assert better(0.5, None, "top1")
    assert not better(0.5, 0.5, "top1")
    assert better(0.5, 0.5, "top1", loss=0.9)
    assert not better(0.5, 0.5, "top1", loss=1.1)
    assert not better(0.5, 0.5, "top1", best_loss=None)  # a checkpoint of an older version
    assert not better(0.4, 0.5, "top1", loss=0.1)
    assert better(0.4, 0.5, "loss")
    assert not better(float("nan"), 0.5, "top1")


@pytest.mark.parametrize("name", ["step", "kind", "best"])
def test_a_metric_that_is_called_like_another_value_of_a_row_is_refused_before_the_first_step(
    name: str, made_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would overwrite the step or the kind of each val row, and the run could not be resumed or drawn."""
    monkeypatch.setitem(registry.KINDS["metrics"], name, "tltrain.evaluation.metrics:TOP1")
    with pytest.raises(UserError, match=f"a metric is called {name}, and rows of metrics hold another value under that name"):
        train(made_recipe(), RunFlags(folder=tmp_path / "run", workers=0))
    assert not (tmp_path / "run").exists()


def test_no_key_of_a_row_is_free_for_a_metric(finished_run: Path) -> None:
    rows = [row for row in read_rows(finished_run) if row["kind"] in ("val", "teacher", "test")]
    keys = set().union(*rows, json.loads((finished_run / "test_metrics.json").read_text()))
    more = {"share", "curve"} | {"views", "strangers"}  # of a blend's row, and of an evaluation that was asked for them
    more |= {"groups", "ends", "tree", "per_label"}  # of test images in groups, of classes in a tree, of several labels
    assert keys - set(registry.names("metrics")) | more == metric.RESERVED
