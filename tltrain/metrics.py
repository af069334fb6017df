"""Exact metrics from gathered predictions: every sample once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

NUM_BINS = 15  # of the reliability diagram and the calibration error, as in Guo et al. 2017


@dataclass(frozen=True)
class Predictions:
    """What a network said of a split, one entry a sample, ordered by position in the split."""

    index: np.ndarray
    """(N,) int64, position in the split."""
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


def summary(p: Predictions, num_classes: int) -> dict[str, Any]:
    """The figures of one evaluation. Averages by scikit-learn over the classes that occur; top5 is null for five classes or fewer."""
    out: dict[str, Any] = {"n": len(p.label), "loss": float(p.loss.mean()), "top1": float((p.predicted == p.label).mean())}
    out["top5"] = float(p.in_top5.mean()) if num_classes > 5 else None
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = precision_recall_fscore_support(p.label, p.predicted, average=average, zero_division=0)
        out |= {f"precision_{average}": float(precision), f"recall_{average}": float(recall), f"f1_{average}": float(f1)}
    return {**out, "ece": calibration_error(p)}


def details(p: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Per class, the confusion matrix (rows: true class), reliability before and after calibration, as plain values for JSON."""
    labels = list(range(len(classes)))
    columns = precision_recall_fscore_support(p.label, p.predicted, labels=labels, zero_division=0)
    per_class = [
        {"name": name, "precision": float(a), "recall": float(b), "f1": float(c), "support": int(d)}
        for name, a, b, c, d in zip(classes, *columns, strict=True)
    ]
    confusion = confusion_matrix(p.label, p.predicted, labels=labels).tolist()
    said = {"classes": list(classes), "per_class": per_class, "confusion": confusion, "reliability": reliability(p)}
    after = replace(p, confidence=p.calibrated)
    calibration = {"temperature": p.temperature, "ece": calibration_error(after), "reliability": reliability(after)}
    return {**said, "calibration": calibration}


def reliability(p: Predictions) -> list[dict[str, float]]:
    """Bins of equal width over confidence; empty ones are left out."""
    which = np.clip(np.ceil(p.confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    right = p.predicted == p.label
    bins = []
    for b in np.unique(which):
        inside = which == b
        bins.append({
            "low": b / NUM_BINS, "high": (b + 1) / NUM_BINS, "n": int(inside.sum()),
            "confidence": float(p.confidence[inside].mean()), "accuracy": float(right[inside].mean()),
        })  # fmt: skip
    return bins


def calibration_error(p: Predictions) -> float:
    """Expected calibration error: |confidence - accuracy| of each bin, weighted by its share of the samples."""
    return float(sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in reliability(p)) / len(p.label))


def is_better(value: float, best: float | None, metric: str) -> bool:
    """Strictly better: a tie keeps the earlier weights. Lower is better for loss, higher for the rest."""
    return best is None or (value < best if metric == "loss" else value > best)
