"""Pooled figures of several labels an image: each is named by thresholds that were fitted on the val split of its own fold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tltrain.evaluation import metrics
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.runs.pages.compare_page import between
from tltrain.runs.record import RunRecord, has_labels, labels_in, number
from tltrain.runs.report import labels as of_labels
from tltrain.runs.report.formatting import percent, plural
from tltrain.runs.report.stats import Interval


@dataclass(frozen=True)
class PooledLabels(LabelPredictions):
    """Answers of networks that named labels by thresholds of their own, one row for each image in each repeat."""

    named: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))
    """(N, K) bool, in place of the one that thresholds of its own would give."""
    repeated: bool = False
    """Whether `group` holds the answers on one image together, and no images that are alike."""


def pooled(
    rows: Sequence[Mapping[str, str]], tests: Sequence[Mapping[str, Any]], ids: Sequence[str], group_N: np.ndarray | None
) -> PooledLabels:
    """All answers of the runs. rows: of their test_predictions.csv, with `probability_columns`. ids: (N,) of all images, sorted.

    group_N: of them; where there are repeats, an image is a group.
    """
    classes = list(tests[0]["classes"])
    at = {name: i for i, name in enumerate(ids)}
    position = np.array([at[row["id"]] for row in rows])
    logits_NK, target_NK = labels_in(rows, classes)
    named_NK = np.array([has_labels(row["predicted"], classes) for row in rows])
    thresholds = np.median([[row["threshold"] for row in test["per_label"]] for test in tests], axis=0)
    repeated = group_N is None and len(rows) > len(ids)
    group = position if repeated else None if group_N is None else group_N[position]
    return PooledLabels(position, target_NK, logits_NK, 1.0, tuple(thresholds.tolist()), group, named_NK, repeated)


def figures(p: PooledLabels, tests: Sequence[Mapping[str, Any]], num_images: int, exact: float) -> dict[str, Any]:
    """The figures of one test of all images. exact: the share of images with all labels right."""
    classes, n_F = list(tests[0]["classes"]), np.array([test["n"] for test in tests], dtype=np.float64)
    temperatures = [float(test["calibration"]["temperature"]) for test in tests]
    found = {**metrics.summary(p, len(classes)), **metrics.details(p, classes)}
    loss_F = [number(test, "loss") for test in tests]
    there = {i: k for k, i in enumerate(p.position.tolist())}
    support_K = p.target[sorted(there.values())].sum(0)  # repeats of an image make it no second image
    rows = [{**row, "support": int(num)} for row, num in zip(found["per_label"], support_K, strict=True)]
    calibration = {**found["calibration"], "temperature": float(np.median(temperatures))}
    loss = float(np.dot(n_F, loss_F) / n_F.sum()) if all(map(math.isfinite, loss_F)) else None
    of_all = {"n": num_images, "loss": loss, "subset_accuracy": exact, "weights": "each fold's", "how": _how(p, tests)}
    if p.repeated:
        del found["groups"]
    return {**found, **of_all, "per_label": rows, "calibration": calibration}


def _how(p: PooledLabels, tests: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the table of labels says of its intervals, of the thresholds and of the temperatures."""
    worth = {"worth": ", for as many images as the answers of several networks on each are worth"} if p.repeated else {}
    if not any(map(of_labels.fitted, tests)):
        return worth
    temperatures = [float(test["calibration"]["temperature"]) for test in tests]
    between = f"{min(temperatures):.2f} to {max(temperatures):.2f}"
    return {
        **worth,
        "named": "A label is named from the threshold of each run on, that with the largest F1 on its own val; their median is shown.",
        "trust": f"Probabilities come from the logits of each run, divided by a temperature that was fitted on its own val, {between}.",
    }


def verdict(test: Mapping[str, Any], exact: Interval, seen: str) -> str:
    """The result in a sentence. seen: who judged each image."""
    ends = test["intervals"].get("map")
    worth = f" (95\u202f% interval {100 * ends[0]:.1f} to {100 * ends[1]:.1f}\u202f%)" if ends else ""
    return (
        f"mAP is {percent(number(test, 'map'))}{worth}; all labels are right on {percent(exact.value)} of "
        f"{plural(int(test['n']), 'image')} ({between(exact)}), each judged by {seen} that never saw it."
    )


def key_figures(test: Mapping[str, Any], runs: Sequence[RunRecord]) -> list[tuple[str, str, str]]:
    """(name, value, note) for the page."""
    frequency_K = [row["frequency"] for row in test["per_label"] if row["support"]]
    each = [number(run.test or {}, "map") for run in runs]
    spread = f"standard deviation of mAP over {plural(len(each), 'run')}, {percent(min(each))} to {percent(max(each))}"
    named = "named from the thresholds of each fold's own val on" if "named" in test["how"] else "named from 0.5 on"
    of_map, of_f1 = (of_labels.between(test, key) for key in ("map", "f1_macro"))
    return [
        ("mAP", percent(number(test, "map")), f"{of_map}mean over labels of the average precision of all images"),
        ("Baseline", percent(sum(frequency_K) / max(len(frequency_K), 1)), "mAP of a random order: the labels' mean frequency"),
        ("F1", percent(number(test, "f1_macro")), f"{of_f1}mean over labels, {named}"),
        ("Exact sets", percent(number(test, "subset_accuracy")), "of images all labels are right"),
        ("From fold to fold", f"{100 * float(np.std(each, ddof=1)):.1f}\u00a0points" if len(each) > 1 else "\u2013", spread),
    ]
