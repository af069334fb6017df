"""The page of a probe: accuracy against cost, so that a person sees where more time buys no more accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from tltrain.analysis.at_hand import AtHand
from tltrain.analysis.probe import terminal
from tltrain.analysis.probe.judge import NEIGHBOURS, Probed, ProbeRow
from tltrain.runs.report import tables
from tltrain.runs.report.charts import Mark, Point, axis, log_axis, mark_chart
from tltrain.runs.report.formatting import compact, count, percent, plural
from tltrain.runs.report.html import Html, breakable, el, join, page

GOOD, WORSE = "s0", "s1"


def probe_page(probed: Probed, here: AtHand | None) -> str:
    """The HTML page. here: the search for backbones, where none was named."""
    title = f"Which backbone for {probed.ask.source}"
    best, *more = terminal.verdict(probed)
    header = el("header", el("h1", title), el("p", best, class_="verdict"), *(el("p", line) for line in more))
    return page(title, header, _figures(probed), _chart(probed), _table(probed), _how(probed), _left(probed, here))


def _figures(probed: Probed) -> Html:
    which = "all splits" if probed.ask.everything else "train and val; test stays unseen"
    knee = probed.knee
    return tables.figures([
        ("Best", percent(probed.rows[0].accuracy), probed.rows[0].name),
        ("Quickest that may be as good", f"{1000 * knee.image_s:.3g} ms", knee.name),
        ("Images", count(probed.num_images), which),
        ("Random order", percent(probed.baseline), f"mAP of {plural(probed.num_classes, 'label')}: their mean frequency")
        if probed.ask.several else
        ("Most frequent class", percent(probed.baseline), plural(probed.num_classes, "class").replace("classs", "classes")),
    ])  # fmt: skip


def _what(probed: Probed) -> str:
    return "mAP" if probed.ask.several else "Accuracy"


def _style(row: ProbeRow) -> str:
    return GOOD if row.as_good else WORSE


def edge(rows: Sequence[ProbeRow]) -> list[Point]:
    """(ms, accuracy) of the rows that no quicker one equals, from the quickest on."""
    points: list[Point] = []
    for row in sorted(rows, key=lambda row: (row.image_s, -row.accuracy)):
        if not points or row.accuracy > points[-1][1]:
            points.append((1000 * row.image_s, row.accuracy))
    return points


def _chart(probed: Probed) -> Html:
    rows = probed.rows
    times = [1000 * row.image_s for row in rows]
    y = axis(min(row.low for row in rows), max(row.high for row in rows))
    marks = [
        Mark(str(i), 1000 * row.image_s, row.accuracy, row.low, row.high, _style(row)) for i, row in enumerate(rows, start=1)
    ]  # fmt: skip
    keys = [(GOOD, "may be as good as the best"), (WORSE, "clearly worse")]
    used = [key for key in keys if key[0] in {mark.style for mark in marks}]
    drawn = mark_chart(
        f"{_what(probed)} against time, %", marks, log_axis(min(times), max(times)), y, compact, lambda share: f"{100 * share:.4g}",
        x_label="milliseconds of one image in the network, on this machine", keys=used, edge=(edge(rows), "the best for its time"),
    )  # fmt: skip
    kind = "Wilson's; where images have groups, for as many images as the groups are worth"
    if probed.ask.several:
        kind = "of the bootstrap over images, or over groups of them"
    note = el("p", f"The numbers are the rows of the table. Lines are 95\u202f% intervals: {kind}.", class_="note")
    return el("section", el("h2", f"{_what(probed)} against cost"), drawn, note)


def _table(probed: Probed) -> Html:
    rows = []
    for i, row in enumerate(probed.rows, start=1):
        name = join(el("i", class_=f"key {_style(row)}"), f"{i} ", breakable(row.name))
        accuracy, interval, difference, paired, near, ms, parameters, store = terminal.figures(row)
        both = f"{difference} ({paired.replace('..', ' to ')})".replace("-", "\u2212") if difference else ""
        rows.append([name, accuracy, interval.replace("-", " to "), both, near, ms, parameters, store])
    what = "mAP, %" if probed.ask.several else "Right, %"
    head = ["Backbone", what, "95\u202f%", "To the best, points", f"{NEIGHBOURS} NN, %", "ms", "Parameters", "Store, an image"]
    return el("section", el("h2", "Each backbone"), tables.table(head, rows, class_="wide"))


def _how(probed: Probed) -> Html:
    lines = [*terminal.measured(probed), *probed.notes]
    chosen = "The best of several is chosen by the same images that its figure is of: expect a little less of it on new ones."
    return el("section", el("h2", "How it was measured"), *(el("p", f"{line[0].upper()}{line[1:]}.") for line in lines), el("p", chosen))


def _left(probed: Probed, here: AtHand | None) -> Html | None:
    """The backbones that could not be probed, and why."""
    rows = [[name, why] for name, why in probed.problems.items()]
    if here is not None:
        rows += [[name, join("Not on this machine. Get it: ", el("code", how))] for name, how in here.absent.items()]
        rows += [[name, "Here, and not looked at: name it with --backbones"] for name in here.more]
    if not rows:
        return None
    return el("section", el("h2", "Not looked at"), tables.table(["Backbone", "Why"], rows, texts=2, class_="recipes"))
