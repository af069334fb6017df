"""Findings of the doctor: a problem and a suggestion per image, and the table that data.exclude and data.relabel read."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tltrain.core.output import escape
from tltrain.data.tables.corrections import EXCLUDE, LOOK, RELABEL

COLUMNS = ("path", "problem", "suggestion", "score", "other")
BLANK, THIN, TINY, BLURRED = "blank", "long and thin", "tiny", "blurred"
IDENTICAL, TWIN = "identical", "near-duplicate"
TWIN_LABELS = "duplicate across classes"
TWIN_SPLITS = "duplicate across splits"
WRONG, OUTLIER = "wrong label", "outlier"

MEANING = {
    BLANK: "Hardly anything but one colour.",
    IDENTICAL: "The same bytes as another file.",
    TWIN: "The same picture once more: saved again, resized, cropped a little, or mirrored.",
    TWIN_SPLITS: "The same picture in two splits: what is tested on was trained on, which flatters the result.",
    TWIN_LABELS: "The same picture under two classes, or two sets of labels: one of them is wrong.",
    WRONG: "A head that has not seen the image gives its own class little, and another one much, or doubts one of its labels.",
    OUTLIER: "Far from the images of its class.",
    BLURRED: "Far less detail than the other images have.",
    TINY: "Far fewer pixels than the network sees: most of what it is given is interpolated.",
    THIN: "One side is much longer: the centre crop, which the network sees, leaves most of it out.",
}
"""Every problem, in the order in which they are listed."""


@dataclass(frozen=True)
class Finding:
    """A problem of one image."""

    path: str
    """The image's id, as data.exclude and data.relabel name it."""
    problem: str
    suggestion: str
    """exclude, relabel:CLASS, or look."""
    score: float
    """How sure: what it measures depends on the problem (`SCORES`)."""
    other: str = ""
    """The other image of a pair, or the class, or the set of labels, that a wrong one should be."""
    position: int = -1
    """The image's place among those that were looked at."""
    other_position: int | None = None


SCORES = {
    BLANK: "standard deviation of its grey values, of 255",
    IDENTICAL: "similarity",
    TWIN: "similarity",
    TWIN_SPLITS: "similarity",
    TWIN_LABELS: "similarity",
    WRONG: "probability of the other class, or answer to a label, less that of its own",
    OUTLIER: "distance to its class, in spreads of the set above the median",
    BLURRED: "detail, in spreads of the set below the median",
    TINY: "longer side, pixels",
    THIN: "longer side divided by the shorter",
}


def settled(findings: Sequence[Finding]) -> list[Finding]:
    """The findings in their order, with one suggestion an image at most that changes anything: excluded images get no other class."""
    excluded = {f.path for f in findings if f.suggestion == EXCLUDE}
    done: set[str] = set()
    order = list(MEANING)
    result = []
    for finding in sorted(
        findings, key=lambda f: (order.index(f.problem), -f.score if f.problem not in (BLANK, TINY) else f.score, f.path)
    ):
        acts = finding.suggestion == EXCLUDE or finding.suggestion.startswith(RELABEL)
        if acts and (finding.path in done or (finding.suggestion != EXCLUDE and finding.path in excluded)):
            result.append(replace(finding, suggestion=LOOK))
            continue
        if acts:
            done.add(finding.path)
        result.append(finding)
    return result


def table(findings: Sequence[Finding]) -> str:
    """The table as CSV text, for spreadsheets and for data.exclude and data.relabel."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for f in findings:
        writer.writerow([escape.csv_cell(f.path), f.problem, escape.csv_cell(f.suggestion), f"{f.score:.4g}", escape.csv_cell(f.other)])
    return text.getvalue()
