"""The page that compares runs: accuracy on the same test images, cost, recipes, learning curves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tltrain.core.output import escape
from tltrain.runs.pages.comparison import ComparedRun, Group, Paired, differing, grouped, paired, welch
from tltrain.runs.record import RunRecord, number
from tltrain.runs.report import learning, tables, tree
from tltrain.runs.report.charts import COLOURS, axis
from tltrain.runs.report.formatting import DASH, count, decimal, duration, ended, memory, percent, plural, points, signed
from tltrain.runs.report.html import Html, el, join, page
from tltrain.runs.report.stats import RESAMPLES, Interval

_MOST_VALUES = 15  # recipe differences shown without a click


def comparison(entries: Sequence[ComparedRun], out: Path, title: str, lead: str) -> str:
    """The HTML page. Links to the runs' own reports are relative to `out`."""
    groups = grouped(entries)
    headline, why = verdict(entries)
    return page(
        title,
        el(
            "header",
            el("h1", title),
            el("p", headline, class_="verdict"),
            el("p", why) if why else None,
            _lead(lead) if lead else None,
        ),
        _seeds(groups),
        _table(entries, groups, out),
        _note(entries),
        tree.compared([(e.name, e.run.test) for e in leaderboard(entries) if e.run.test is not None]),
        _pairs(entries),
        _recipes(groups),
        learning.compared([(i, g.name if k == 0 else "", e.run) for i, g in enumerate(groups) for k, e in enumerate(g.entries)]),
    )


def _lead(text: str) -> Html:
    """What was compared. Commands stand between backticks."""
    return el("p", *(el("code", part) if i % 2 else part for i, part in enumerate(text.split("`"))), class_="note")


def verdict(entries: Sequence[ComparedRun]) -> tuple[str, str]:
    """(the best run or recipe and its lead over the next, the test by which that lead was judged)."""
    groups = grouped(entries)
    if any(len(group.accuracies) > 1 for group in groups):
        return _verdict_over_seeds(groups)
    ranked = ranking(entries)
    if not ranked:
        return "No run has been tested yet.", ""
    first, *others = ranked
    assert first.accuracy is not None
    n, share = num_tested(first.run), first.accuracy.value
    if not others:
        return f"{first.name}: {percent(share)} of {plural(n, 'test image')} are right (95\u202f% interval {between(first.accuracy)}).", ""
    second = others[0]
    assert second.accuracy is not None
    if second.accuracy.value == share:
        return f"{first.name} and {second.name} get the same share of test images right, {percent(share)} of {count(n)}.", ""
    luck, why = _chance(first, second)
    most = "has all labels right on the most test images" if _of_labels(entries) else "gets the most test images right"
    best = f"{first.name} {most}: {percent(share)} of {count(n)}"
    return f"{best}, against {percent(second.accuracy.value)} for {second.name}; {_judged(luck)}.", why


def _judged(luck: bool) -> str:
    return "the difference may be luck" if luck else "more than luck explains"


def ranking(entries: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The tested runs, the best first."""
    return sorted((e for e in entries if e.accuracy is not None), key=lambda e: -e.accuracy.value if e.accuracy else 0.0)


def leaderboard(entries: Sequence[ComparedRun]) -> list[ComparedRun]:
    """All runs, the best first, and those without a test behind them in the order they were given."""
    return [*ranking(entries), *(e for e in entries if e.accuracy is None)]


def on_several(entries: Sequence[ComparedRun]) -> bool:
    """Whether a run used several processes, so that device time is not time."""
    return any(math.isfinite(e.run.seconds) and e.device_seconds != e.run.seconds for e in entries)


def num_tested(run: RunRecord) -> int:
    return int((run.test or {})["n"])


def between(figure: Interval) -> str:
    return f"{100 * figure.low:.1f}\u00a0to\u00a0{100 * figure.high:.1f}\u202f%"


def _verdict_over_seeds(groups: Sequence[Group]) -> tuple[str, str]:
    ranked = sorted((g for g in groups if len(g.accuracies)), key=lambda g: -g.mean)
    first, *others = ranked
    seeds = len(first.accuracies)
    best = f"{first.name} gets {percent(first.mean)} of test images right, {f'the mean of {seeds} seeds' if seeds > 1 else 'with one seed'}"
    if not others:
        return f"{best} (standard deviation {points(first.spread)}).", ""
    second = others[0]
    best += f", against {percent(second.mean)} for {second.name}"
    tested = welch(first, second)
    if tested is None:
        return f"{best}.", "With fewer than two seeds each, the effect of the seed on this difference is unknown."
    difference, p = tested
    why = (
        f"The difference is {points(difference.value)} (95\u202f% interval {100 * difference.low:.1f} to {points(difference.high)}; "
        f"Welch's t over seeds, {p_value(p)})."
    )
    return f"{best}; {_judged(p >= 0.05)}.", why


def _chance(first: ComparedRun, second: ComparedRun) -> tuple[bool, str]:
    """(whether the choice of test images may explain the difference of two runs, the test by which that was judged)."""
    pair = paired(first, second)
    if pair is not None:
        how, other = ("alone is right", "alone on") if pair.once else ("is right more often", "on")
        covers = "what the networks learned from" if first.is_folds else "the seed"
        return pair.p >= 0.05, (
            f"On the same images, {first.name} {how} on {count(pair.only_first)}, {second.name} {other} {count(pair.only_second)} "
            f"({pair.test}, {p_value(pair.p)}). This covers the luck of the test images, not that of {covers}."
        )
    assert first.accuracy is not None
    assert second.accuracy is not None
    apart = first.accuracy.low > second.accuracy.high
    return not apart, f"Their 95\u202f% intervals {'do not overlap' if apart else 'overlap'}."


def p_value(p: float) -> str:
    return "p < .001" if p < 0.001 else f"p = {p:.3f}"


def _seeds(groups: Sequence[Group]) -> Html | None:
    """Mean and standard deviation of each group; None if every group is one run."""
    if all(len(group.entries) == 1 for group in groups):
        return None
    rows: list[list[str]] = []
    for i, group in enumerate(groups):
        each = group.accuracies
        low, high = (percent(float(f(each))) if len(each) else DASH for f in (min, max))
        seconds = [e.run.seconds for e in group.entries if math.isfinite(e.run.seconds)]
        mean_s = sum(seconds) / len(seconds) if seconds else math.nan
        name = join(el("i", class_=f"key {_style(i)}"), group.name)
        rows.append([name, count(len(each)), percent(group.mean), points(group.spread), low, high, duration(mean_s)])
    right = "All labels right" if _of_labels(groups[0].entries) else "Test accuracy"
    head = ["Recipe", "Seeds", f"{right}, mean", "Standard deviation", "Lowest", "Highest", "Time, mean"]
    return el("section", el("h2", "Over seeds"), tables.table(head, rows, class_="wide"), el("h2", "Each run"))


def _table(entries: Sequence[ComparedRun], groups: Sequence[Group], out: Path) -> Html:
    ends = [e.accuracy for e in entries if e.accuracy is not None]
    scale = axis(min((e.low for e in ends), default=0.0), max((e.high for e in ends), default=1.0))
    low, high = max(0.0, scale.low), min(1.0, scale.high)
    styles = {id(e): _style(i) for i, group in enumerate(groups) for e in group.entries}
    several = on_several(entries)
    rows = [_row(styles[id(e)], e, out, low, high, several) for e in leaderboard(entries)]
    marks = f"{100 * low:.0f} to {100 * high:.0f}\u202f%"
    right, also = ("All labels right", "mAP") if _of_labels(entries) else ("Test accuracy", "ECE")
    head = ["Run", right, marks, "F1, mean", also, "Trained on", "Time", *(["Device time"] if several else []), "Peak memory"]
    return tables.table(head, rows, class_="wide")


def _of_labels(entries: Sequence[ComparedRun]) -> bool:
    """Whether each image has several labels."""
    return all(e.run.recipe.data.multilabel for e in entries)


def _row(style: str, e: ComparedRun, out: Path, low: float, high: float, several: bool) -> list[str]:
    run, report = e.run, e.run.path / e.page
    where = os.path.relpath(report, out.parent) if report.is_file() else None
    label = el("a", e.name, href=escape.url(Path(where).as_posix())) if where else Html(el("span", e.name))
    first = join(el("i", class_=f"key {style}"), label)
    on_devices = [duration(e.device_seconds)] if several else []
    cost = [count(run.num_images), duration(run.seconds), *on_devices, memory(e.peak_bytes)]
    if run.test is None or e.accuracy is None:
        return [first, ended(run), "", DASH, DASH, *cost]
    mark = tables.strip(*e.accuracy, low, high, style)
    f1 = _figure(e.f1) if e.f1 is not None else percent(number(run.test, "f1_macro"))
    return [first, _figure(e.accuracy), mark, f1, _mean_ap(run.test) if "map" in run.test else decimal(number(run.test, "ece")), *cost]


def _mean_ap(test: Mapping[str, Any]) -> str:
    value, ends = number(test, "map"), (test.get("intervals") or {}).get("map")
    return percent(value) if ends is None else _figure(Interval(value, *ends))


def _figure(figure: Interval) -> Html:
    """A metric with its interval below it."""
    return join(percent(figure.value), el("small", between(figure), class_="below"))


def _style(index: int) -> str:
    return f"s{index % COLOURS}"


def _note(entries: Sequence[ComparedRun]) -> Html:
    share, others = ("the share of images", "means over labels") if _of_labels(entries) else ("an accuracy of images", "F1")
    sentences = [
        f"95\u202f% intervals: Wilson's for {share} judged once each, else the bootstrap, as for {others}, with {RESAMPLES:,} resamples "
        "of the test images. Trained on counts images, repeats included."
    ]
    if not _of_labels(entries):
        sentences.append("The calibration error (ECE) is measured before calibration.")
    if any(e.predicted is not None and e.predicted.group is not None for e in entries):
        sentences.append("Where images have groups, Wilson's is for as many images as they are worth, and they are resampled whole.")
    if any(e.run.recipe.backbone.weights for e in entries):
        sentences.append("The cost of the weights that a run starts from is not counted.")
    if any(e.run.recipe.distill for e in entries):
        sentences.append("The cost of a teacher is not counted.")
    sentences.append(
        "Each row is a cross-validation: images are resampled with all of their predictions."
        if any(e.is_folds for e in entries)
        else "Each row is one run; another seed gives other values."
    )
    return el("p", " ".join(sentences), class_="note under")


def pairs_with_best(entries: Sequence[ComparedRun]) -> list[Paired]:
    """The best run paired with each other run that was tested on the same images, the closest first."""
    ranked = ranking(entries)
    pairs = [paired(ranked[0], other) for other in ranked[1:]]
    return [pair for pair in pairs if pair is not None]


def _pairs(entries: Sequence[ComparedRun]) -> Html | None:
    pairs = pairs_with_best(entries)
    if not pairs:
        return None
    best = pairs[0].first.name
    rows = [
        [pair.second.name, _points(pair.gain), count(pair.only_first), count(pair.only_second), p_value(pair.p)[2:].removeprefix("= ")]
        for pair in pairs
    ]
    share = "the share of images whose labels are all right" if _of_labels([pairs[0].first]) else "test accuracy"
    text = f"{best} with each of the others, image by image. The difference is in points of {share}, with its 95\u202f% interval "
    over = "images" if pairs[0].first.predicted is None or pairs[0].first.predicted.group is None else "groups of images"
    text += f"(bootstrap over {over}, each with both answers); p is that of the {pairs[0].test}. "
    if len(pairs) > 1:
        text += f"Of {len(pairs)} such tests, about one in twenty has p < .05 by chance alone."
    head = ["Against", "Difference", "Only the best right", "Only the other right", "p"]
    note = el("p", text, class_="note")
    return el("section", el("h2", "On the same images"), note, tables.table(head, rows, class_="wide"))


def _points(figure: Interval) -> Html:
    ends = f"{signed(figure.low)}\u00a0to\u00a0{signed(figure.high)}"
    return join(signed(figure.value), el("small", ends, class_="below"))


def _recipes(groups: Sequence[Group]) -> Html | None:
    """A row for each value that differs between the recipes."""
    rows = [[el("code", path), *(value_text(v) for v in values)] for path, values in differing(groups)]
    if len(groups) < 2 or not rows:
        return None
    note = el("p", "All other values of the recipes are the same.", class_="note under")
    table = tables.table(["Value", *(group.name for group in groups)], rows, texts=1 + len(groups), class_="wide recipes")
    if len(rows) > _MOST_VALUES:
        table = el("details", el("summary", f"{len(rows)} values"), table)
    return el("section", el("h2", "Where the recipes differ"), table, note)


def value_text(value: Any) -> str:
    """A recipe value as YAML shows it; a dash if the recipe has no such value."""
    return DASH if value is ... else value if isinstance(value, str) else json.dumps(value)
