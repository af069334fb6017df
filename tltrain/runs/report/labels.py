"""The parts of a page for several labels per image: key figures and a table. There is no confusion matrix: labels do not compete."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tltrain.runs.record import RunRecord, number
from tltrain.runs.report import tables
from tltrain.runs.report.formatting import DASH, count, decimal, grouped, interval, percent, tenths
from tltrain.runs.report.html import Html, el, join
from tltrain.runs.report.stats import ends_of

_IN_CLASS_ORDER = 12  # labels up to which the table keeps the class list's order


def figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """(name, value, note) of the test's key figures. Empty without a test, and for runs of one class an image."""
    test = run.test
    if test is None or "per_label" not in test:
        return []
    n, rows = int(test["n"]), test["per_label"]
    frequency_K = [row["frequency"] for row in rows if row["support"]]  # mAP leaves out a label that no image has
    frequency = sum(frequency_K) / len(frequency_K) if frequency_K else math.nan
    exact = number(test, "subset_accuracy")
    return [
        (
            "Test mAP",
            percent(number(test, "map")),
            f"{between(test, 'map')}mean over labels of the average precision; {test['weights']} weights",
        ),
        ("Baseline", percent(frequency), "mAP of a random order: the labels' mean frequency"),
        (
            "Test F1",
            percent(number(test, "f1_macro")),
            f"{between(test, 'f1_macro')}mean over labels; over all answers {percent(number(test, 'f1_micro'))}",
        ),
        (
            "Test AUROC",
            percent(number(test, "auroc_macro")),
            f"{between(test, 'auroc_macro')}mean over labels; 50\u202f% is a random order",
        ),
        ("Exact sets", percent(exact), f"{interval(exact, n, test)}; all labels are right, of {count(n)} test images{grouped(test)}"),
        ("Test loss", decimal(number(test, "loss")), "binary cross entropy, mean over labels"),
    ]


def between(test: Mapping[str, Any], key: str) -> str:
    """`66.0 to 78.1 %; `, the interval of a mean over labels. Empty for a run of an older version, and for too many answers."""
    if (ends := (test.get("intervals") or {}).get(key)) is None:
        return ""
    return f"{100 * ends[0]:.1f}\u00a0to\u00a0{100 * ends[1]:.1f}\u202f%; "


def by_label(run: RunRecord) -> Html | None:
    """The section on each label. None without a test, and for runs of one class an image."""
    if run.test is None or "per_label" not in run.test:
        return None
    rows = run.test["per_label"]
    many = len(rows) > _IN_CLASS_ORDER
    shown = sorted(rows, key=lambda row: number(row, "ap")) if many else rows
    head = ["Label", "Images", "AP", "Chance", "AUROC", "F1", "Recall", "95\u202f%", "Precision", "95\u202f%", "Threshold", "ECE"]
    how = _how(run.test)
    told = (
        f"{'Worst first. ' if many else ''}In\u202f%; intervals are Wilson's{how['worth']}. {how['named']} "
        "Chance is the label's frequency: the average precision (AP) of a random order."
    )
    note = el("p", told, class_="note")
    trust = (
        f"{how['trust']} ECE is how far a label's probability is from its frequency among images of that probability: "
        f"{decimal(run.test['calibration']['ece'])} in the mean."
    )
    table = tables.table(head, [_row(row) for row in shown], class_="tall wide")
    return el("section", el("h2", "Label by label"), join(note, table, el("p", trust, class_="note under")))


def fitted(test: Mapping[str, Any]) -> bool:
    """Whether thresholds or the temperature were fitted on val: without val they stay at 0.5 and 1."""
    return test["calibration"]["temperature"] != 1 or any(row["threshold"] != 0.5 for row in test["per_label"])


def _how(test: Mapping[str, Any]) -> dict[str, str]:
    """The sentences on intervals, thresholds and the temperature. Folds together have words of their own, under `how`."""
    named, trust = "A label is named from 0.5 on: no threshold was fitted.", "Probabilities come from logits as they are."
    if fitted(test):
        named = "A label is named from its threshold on, that with the largest F1 on val."
        trust = f"Probabilities come from logits divided by a temperature of {test['calibration']['temperature']:.2f}, fitted on val."
    worth = ", for as many images as the groups are worth" if "groups" in test else ""
    return {"worth": worth, "named": named, "trust": trust, **test.get("how", {})}


def _row(row: Mapping[str, Any]) -> list[str]:
    support = int(row["support"])
    said = round(row["recall"] * support / row["precision"]) if row["precision"] else 0
    shares = [_tenths(number(row, key)) for key in ("ap", "frequency", "auroc", "f1")]
    ends = [
        tenths(row["recall"]) if support else DASH,
        _ends(row.get("recall_ends"), row["recall"], support),
        tenths(row["precision"]),
        _ends(row.get("precision_ends"), row["precision"], said),
    ]
    return [str(row["name"]), count(support), *shares, *ends, decimal(row["threshold"]), decimal(row["ece"])]


def _tenths(share: float) -> str:
    return tenths(share) if math.isfinite(share) else DASH


def _ends(ends: Sequence[float] | None, share: float, n: int) -> str:
    if not n:
        return DASH
    low, high = ends_of({"ends": ends}, share, n)
    return f"{100 * low:.0f}\u00a0to\u00a0{100 * high:.0f}"
