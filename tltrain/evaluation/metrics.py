"""Metrics from gathered predictions. Each sample counts once, for any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from tltrain.core.metric import Metric, metric, of_data
from tltrain.evaluation.multilabel import details as of_labels
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.runs.report import tree
from tltrain.runs.report.stats import accuracy_interval
from tltrain.uncertainty import abstain, conformal
from tltrain.uncertainty.abstain import Abstention
from tltrain.uncertainty.answers import Answers, Val
from tltrain.uncertainty.conformal import Sets

NUM_BINS = 15  # of the reliability diagram and the calibration error, as in Guo et al. 2017


class Scores(NamedTuple):
    """Averages over the classes that occur."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Predictions:
    """A network's predictions for a split, one entry for each sample, ordered by position in the split."""

    position: np.ndarray
    """(N,) int64, in the split."""
    label: np.ndarray
    """(N,) int64."""
    predicted: np.ndarray
    """(N,) int64."""
    confidence: np.ndarray
    """(N,) float64, softmax probability of the predicted class."""
    loss: np.ndarray
    """(N,) float64, cross entropy."""
    in_top5: np.ndarray
    """(N,) bool."""
    calibrated: np.ndarray
    """(N,) float64, the confidence after the logits were divided by `temperature`."""
    temperature: float = 1.0
    own: np.ndarray | None = None
    """(N,) float64, the probability of the image's own class, calibrated."""
    set_sizes: np.ndarray | None = None
    """(N, T) int64, the classes whose calibrated probability reaches each threshold that was asked for; at least 1."""
    group: np.ndarray | None = None
    """(N,) int64, the group of each sample, such as those of one patient. None: each stands alone."""
    present: np.ndarray | None = None
    """The classes that averages go over. None: those that occur as label or prediction."""

    @cached_property
    def macro(self) -> Scores:
        """Every class has the same weight. Cached, since three metrics use it."""
        return _scores(self, "macro")

    @cached_property
    def weighted(self) -> Scores:
        """Each class is weighted by its number of samples. Cached, since three metrics use it."""
        return _scores(self, "weighted")


def in_groups(p: Predictions, group_N: np.ndarray | None) -> Predictions:
    """The predictions with the groups of their samples. group_N: the group of each sample of the split, in its order; None without."""
    return replace(p, group=None if group_N is None else group_N[p.position])


def with_groups(
    p: Predictions | LabelPredictions, group_N: np.ndarray | None, thresholds: tuple[float, ...] | None
) -> Predictions | LabelPredictions:
    """The predictions with the groups of their samples, and of several labels with the thresholds from which each is named."""
    if isinstance(p, LabelPredictions):
        return replace(p, thresholds=thresholds, group=None if group_N is None else group_N[p.position])
    return in_groups(p, group_N)


def summary(p: Predictions | LabelPredictions, num_classes: int) -> dict[str, Any]:
    """n and the value of every registered metric of such data. top5 is None for five classes or fewer."""
    out: dict[str, Any] = {"n": len(p.position)}
    for name in of_data(isinstance(p, LabelPredictions)):
        value = metric(name).value(p, num_classes)
        out[name] = None if value is None else float(value)
    return out


def details(p: Predictions | LabelPredictions, classes: Sequence[str], depth: int | None = None) -> dict[str, Any]:
    """Metrics by class, the confusion matrix (rows are true classes) and reliability before and after calibration, ready for JSON.

    Of several labels: metrics, thresholds and calibration by label. Where samples have groups, `groups` counts them, and `ends` beside a
    share of samples is the interval that respects them.
    depth: data.depth. `tree` then says how answers fare at each level and node of the tree of classes.
    """
    if isinstance(p, LabelPredictions):
        return of_labels.details(p, classes)
    labels = list(range(len(classes)))
    columns = precision_recall_fscore_support(p.label, p.predicted, labels=labels, zero_division=0)
    per_class = [
        {"name": name, "precision": float(a), "recall": float(b), "f1": float(c), "support": int(d), **_ends(p, p.label == k)}
        for k, (name, a, b, c, d) in enumerate(zip(classes, *columns, strict=True))
    ]
    confusion = confusion_matrix(p.label, p.predicted, labels=labels).tolist()
    out = {"classes": list(classes), "per_class": per_class, "confusion": confusion, "reliability": reliability(p)}
    after = replace(p, confidence=p.calibrated)
    calibration = {"temperature": p.temperature, "ece": calibration_error(after), "reliability": reliability(after)}
    grouped = {} if p.group is None else {"groups": len(np.unique(p.group)), **_ends(p, np.ones(len(p.label), bool))}
    in_tree = {} if depth is None else {"tree": tree.figures(classes, p.label, p.predicted, partial(_ends, p))}
    return {**out, "calibration": calibration, **grouped, **in_tree}


def _ends(p: Predictions, among: np.ndarray, hit: np.ndarray | None = None) -> dict[str, list[float]]:
    """`ends` of the share of the samples `among` (N,) that are a hit (N,), by default right. Empty where samples have no groups."""
    if p.group is None or not among.any():
        return {}
    hit_N = p.predicted == p.label if hit is None else hit
    return {"ends": list(accuracy_interval(hit_N[among], p.group[among])[1:])}


def doubts(
    p: Predictions | LabelPredictions, sets: Sequence[Sets], abstentions: Sequence[Abstention], classes: Sequence[str],
    val: Val | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Figures of sets and abstention thresholds that were fitted on val, ready for JSON. Empty without any, and without `val`.

    sets: those whose thresholds `evaluator.predict` was given, in that order. val: its size, for the usual rules.
    """
    if isinstance(p, LabelPredictions) or p.own is None or p.set_sizes is None or not (sets or abstentions or val):
        return {}
    on = Answers(p.calibrated, p.own, p.predicted == p.label)
    shown = [conformal.figures(s, on, size_N, p.label, classes) for s, size_N in zip(sets, p.set_sizes.T, strict=True)]
    for row, s in zip(shown, sets, strict=True):
        hit_N = conformal.covered(s, on)
        row |= _ends(p, np.ones(len(on), bool), hit_N)
        for of in row["per_class"]:
            of |= _ends(p, p.label == classes.index(of["name"]), hit_N)
    answers = [abstain.figures(a, on) | _ends(p, on.confidence > a.threshold) for a in abstentions]
    fitted_on = {} if val is None else {"fitted_on": asdict(val)}
    return {"sets": shown, "abstain": answers, "answered_curve": abstain.curve(on), **fitted_on}


def reliability(p: Predictions) -> list[dict[str, Any]]:
    """Bins of equal width over confidence: bounds, n, mean confidence and accuracy. Empty bins are left out."""
    which = np.clip(np.ceil(p.confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    right = p.predicted == p.label
    bins: list[dict[str, Any]] = []
    for b in np.unique(which):
        inside = which == b
        bins.append({
            "low": b / NUM_BINS, "high": (b + 1) / NUM_BINS, "n": int(inside.sum()),
            "confidence": float(p.confidence[inside].mean()), "accuracy": float(right[inside].mean()), **_ends(p, inside),
        })  # fmt: skip
    return bins


def calibration_error(p: Predictions) -> float:
    """Expected calibration error (ECE): the mean of |confidence - accuracy| over bins, weighted by their numbers of samples."""
    return float(sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in reliability(p)) / len(p.label))


def _scores(p: Predictions, average: str) -> Scores:
    """By scikit-learn."""
    precision, recall, f1, _ = precision_recall_fscore_support(p.label, p.predicted, labels=p.present, average=average, zero_division=0)
    return Scores(float(precision), float(recall), float(f1))


def _top5(p: Predictions, num_classes: int) -> float | None:
    return float(p.in_top5.mean()) if num_classes > 5 else None


BOTH = ("classes", "labels")
LOSS = Metric(lambda p, _: float(p.loss.mean()), higher_is_better=False, title="loss", of=BOTH)
TOP1 = Metric(lambda p, _: float((p.predicted == p.label).mean()), title="accuracy", is_share=True)
TOP5 = Metric(_top5, title="top-5 accuracy", is_share=True)
PRECISION_MACRO = Metric(lambda p, _: p.macro.precision, title="precision, macro mean", is_share=True, of=BOTH)
RECALL_MACRO = Metric(lambda p, _: p.macro.recall, title="recall, macro mean", is_share=True, of=BOTH)
F1_MACRO = Metric(lambda p, _: p.macro.f1, title="F1, macro mean", is_share=True, of=BOTH)
PRECISION_WEIGHTED = Metric(lambda p, _: p.weighted.precision, title="precision, weighted mean", is_share=True)
RECALL_WEIGHTED = Metric(lambda p, _: p.weighted.recall, title="recall, weighted mean", is_share=True)
F1_WEIGHTED = Metric(lambda p, _: p.weighted.f1, title="F1, weighted mean", is_share=True)
ECE = Metric(lambda p, _: calibration_error(p), higher_is_better=False, title="calibration error", is_share=True)
