"""The section of a page on confidence and accuracy: reliability diagrams with their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tltrain.runs.record import RunRecord, number
from tltrain.runs.report import tables as parts
from tltrain.runs.report.charts import reliability_chart
from tltrain.runs.report.formatting import count, decimal, tenths
from tltrain.runs.report.html import Html, el
from tltrain.runs.report.stats import ends_of


def calibration(run: RunRecord) -> Html | None:
    """The section on confidence and accuracy. None without a test."""
    bins = [b for b in run.test.get("reliability", ()) if b["n"]] if run.test else []
    if run.test is None or not bins:
        return None
    text = el("p", parts.calibration(bins, number(run.test, "ece")))
    head = el("h2", "How far to trust its confidence")
    note = el("p", "Each dot is a row of the table below it; a larger one holds more images. Lines are 95\u202f% intervals.", class_="note")
    after = run.test.get("calibration") or {"temperature": 1.0}
    if after["temperature"] == 1:
        return el("section", head, text, el("div", el("div", _reliability(bins), note), _bin_table(bins), class_="pair"))
    usual = f"tltrain predict and exports divide the logits by a temperature of {after['temperature']:.2f}, fitted on val."
    how = f"{after.get('how') or usual} With it the ECE is {decimal(after['ece'])}."
    calibrated = [b for b in after["reliability"] if b["n"]]
    before = el("div", _reliability(bins, ", as trained"), _bin_table(bins))
    calmed = el("div", _reliability(calibrated, ", calibrated"), _bin_table(calibrated))
    return el("section", head, text, el("p", how), el("div", note), el("div", before, calmed, class_="pair"))


def _reliability(bins: Sequence[Mapping[str, Any]], which: str = "") -> Html:
    total = sum(b["n"] for b in bins)
    dots = [(b["confidence"], b["accuracy"], *ends_of(b, b["accuracy"], b["n"]), b["n"] / total) for b in bins]
    return reliability_chart(dots, which)


def _bin_table(bins: Sequence[Mapping[str, Any]]) -> Html:
    rows = [
        [f"{100 * b['low']:.0f} to {100 * b['high']:.0f}", count(b["n"]), tenths(b["confidence"]), tenths(b["accuracy"])]
        for b in reversed(bins)
    ]
    return parts.table(["Confidence, %", "Images", "Mean, %", "Accuracy, %"], rows)
