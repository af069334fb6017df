"""Test metrics by label, and the predictions of each image as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from tltrain.core.output import escape
from tltrain.data.multilabel.label_sets import written
from tltrain.evaluation.multilabel import metrics
from tltrain.evaluation.multilabel.intervals import intervals
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.runs.report.stats import accuracy_interval

NUM_BINS = 15  # as of one class an image


def details(p: LabelPredictions, classes: Sequence[str]) -> dict[str, Any]:
    """Metrics, threshold and calibration by label, ready for JSON. A value that a label does not have is None.

    `intervals` holds those of means over labels, by the name of the metric.
    Where samples have groups, `groups` counts them; `ends` is the interval of exact sets that respects them, and `recall_ends` and
    `precision_ends` are those of a label.
    """
    precision, recall, f1, support = precision_recall_fscore_support(p.target, p.named, average=None, zero_division=0)
    thresholds = p.thresholds or (0.5,) * len(classes)
    columns = {
        "support": support, "frequency": p.target.mean(0), "precision": precision, "recall": recall, "f1": f1,
        "ap": metrics.average_precision(p), "auroc": metrics.auroc(p), "threshold": np.array(thresholds),
        "ece": np.array([calibration_error(share_N, target_N) for share_N, target_N in zip(p.calibrated.T, p.target.T, strict=True)]),
    }  # fmt: skip
    right_NK = p.target == p.named
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            **{key: _plain(column[k]) for key, column in columns.items()},
            **_ends(p, "recall_ends", right_NK[:, k], p.target[:, k]),
            **_ends(p, "precision_ends", right_NK[:, k], p.named[:, k]),
        }
        for k, name in enumerate(classes)
    ]
    calibration = {"temperature": p.temperature, "ece": float(columns["ece"].mean())}
    grouped = {} if p.group is None else {"groups": len(np.unique(p.group))}
    exact = _ends(p, "ends", right_NK.all(1), np.ones(len(p.target), bool))
    return {"classes": list(classes), "per_label": rows, "calibration": calibration, "intervals": intervals(p), **grouped, **exact}


def _ends(p: LabelPredictions, key: str, hit_N: np.ndarray, among_N: np.ndarray) -> dict[str, list[float]]:
    """Under `key`, the 95 % interval of the share of hits among some samples. Empty where samples have no groups, and among none."""
    if p.group is None or not among_N.any():
        return {}
    return {key: list(accuracy_interval(hit_N[among_N], p.group[among_N])[1:])}


def calibration_error(share_N: np.ndarray, target_N: np.ndarray) -> float:
    """Expected calibration error of one label: the mean of |probability - frequency| over bins, weighted by their numbers of samples."""
    which_N = np.clip(np.ceil(share_N * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    parts = [which_N == b for b in np.unique(which_N)]
    return float(sum(part.sum() * abs(share_N[part].mean() - target_N[part].mean()) for part in parts) / len(share_N))


def _plain(value: Any) -> float | int | None:
    if np.isnan(value):
        return None
    return int(value) if isinstance(value, np.integer) else float(value)


def surest_mistakes(p: LabelPredictions) -> np.ndarray:
    """The images with a label missed or wrongly named, as positions in `p`: first those whose worst answer was the surest."""
    surest_N = _doubted(p).max(1)
    wrong = np.flatnonzero(surest_N)
    return wrong[np.argsort(-surest_N[wrong], kind="stable")]


def mistake(p: LabelPredictions, i: int, classes: Sequence[str]) -> dict[str, Any]:
    """What is wrong of an image, ready for JSON: `missed` and `wrong`, pairs of a label and its calibrated probability, the surest first.

    label and predicted: the sets, such as cat|dog. confidence: the probability that the worst answer was given.
    """
    doubted_K = _doubted(p)[i]
    order = [k for k in np.argsort(-doubted_K, kind="stable").tolist() if doubted_K[k]]
    pairs = {has: [[classes[k], float(p.calibrated[i, k])] for k in order if p.target[i, k] == has] for has in (True, False)}
    (label,), (predicted,) = (written(each[i : i + 1], classes) for each in (p.target, p.named))
    return {"label": label, "predicted": predicted, "confidence": float(doubted_K.max()), "missed": pairs[True], "wrong": pairs[False]}


def _doubted(p: LabelPredictions) -> np.ndarray:
    """(N, K): the calibrated probability that a wrong answer was given, of a missed label that it is absent. 0 for a right answer."""
    return np.where(p.named == p.target, 0.0, np.where(p.named, p.calibrated, 1 - p.calibrated))


def predictions_csv(p: LabelPredictions, ids: Sequence[str], classes: Sequence[str]) -> str:
    """A line an image: id, label and predicted (sets, such as cat|dog), confidence (of the answer's least sure label), p:CLASS of each.

    Where samples have groups, a column `group` comes last.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    more = [] if p.group is None else ["group"]
    writer.writerow(["id", "label", "predicted", "confidence", *(escape.csv_cell(f"p:{name}") for name in classes), *more])
    groups: list[list[int]] = [[] for _ in p.target] if p.group is None else [[g] for g in p.group.tolist()]
    sets = zip(p.position, written(p.target, classes), written(p.named, classes), p.sure, p.calibrated, groups, strict=True)
    for position, label, predicted, sure, share_K, group in sets:
        cells = map(escape.csv_cell, (ids[position], label, predicted))
        writer.writerow([*cells, f"{sure:.6f}", *(f"{share:.6f}" for share in share_K), *group])
    return text.getvalue()
