"""folds.html: what a cross-validation says of a recipe, on one page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.runs import run_dir
from tltrain.runs.folds import labels
from tltrain.runs.folds.folder import Member
from tltrain.runs.folds.pooled import Pooled, table
from tltrain.runs.pages import run_page
from tltrain.runs.pages.compare_page import between
from tltrain.runs.record import RunRecord, number
from tltrain.runs.report import confidence
from tltrain.runs.report import tables as parts
from tltrain.runs.report.charts import axis
from tltrain.runs.report.formatting import DASH, count, decimal, duration, finished_of, interval, learned_nothing, percent, plural, points
from tltrain.runs.report.html import Html, el, join, page
from tltrain.runs.report.labels import by_label
from tltrain.runs.report.stats import ends_of

PAGE, TABLE, FIGURES = "folds.html", "out_of_fold.csv", "pooled_metrics.json"


def write(pooled: Pooled) -> Path:
    """Write the page, the predictions and the figures into the folder. Returns the page's path. Raises UserError."""
    folder, test = pooled.folder, pooled.record.test or {}
    figures = {
        **test, "accuracy": pooled.accuracy._asdict(), "f1": pooled.f1._asdict(), "folds": folder.k, "repeats": folder.repeats,
        "runs": [f"r{m.repeat}-f{m.fold}" for m, _ in pooled.runs],
        "map_of_runs" if pooled.several else "top1_of_runs": pooled.accuracies.tolist(),
    }  # fmt: skip
    try:
        files.write_atomic(folder.path / TABLE, table(pooled.predictions, pooled.names))
        files.write_json(folder.path / FIGURES, figures)
        files.write_atomic(folder.path / PAGE, html(pooled).encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(
            f"{folder.path} cannot be written: {error.strerror}; make room, or give yourself the right to write there"
        ) from error
    return folder.path / PAGE


def html(pooled: Pooled) -> str:
    """The HTML page. Links to the runs' own reports are relative to the folder."""
    record = pooled.record
    return page(
        f"{record.recipe.name}, {pooled.folder.k} folds {DASH} tltrain",
        _header(pooled),
        parts.figures(_figures(pooled)),
        _runs(pooled),
        by_label(record) if pooled.several else run_page.errors(record),
        run_page.mistakes(record),
        confidence.calibration(record),
        el(
            "section",
            el("h2", "What was run"),
            el("p"),
            el("details", el("summary", "Environment"), parts.facts(record.env)),
            el("details", el("summary", f"Recipe of {pooled.runs[0][1].path.name}"), el("pre", record.recipe.to_yaml())),
        ),
    )


def verdict(pooled: Pooled) -> str:
    """The result in one or two sentences."""
    n = len(pooled.predictions.ids)
    repeats = len(pooled.by_repeat)
    seen = "a network" if repeats == 1 else f"{repeats} networks" if pooled.is_whole else "networks"
    so_far = f" So far: {finished_of(len(pooled.runs), len(pooled.folder.members))}."
    if pooled.several:
        test = pooled.record.test or {}
        said = labels.verdict(test, pooled.accuracy, seen) + ("" if pooled.is_whole else so_far)
        return said if (nothing := learned_nothing(test)) is None else f"{said} {nothing}"
    head = f"{percent(pooled.accuracy.value)} of {plural(n, 'image')} are right (95\u202f% interval {between(pooled.accuracy)})"
    head += f", each judged by {seen} that never saw it."
    if not pooled.is_whole:
        head += so_far
    name, share = _baseline(pooled)
    if pooled.accuracy.low <= share:
        head += f" This cannot be told from always saying {name}, which is right for {percent(share)}: nothing that was learned shows."
    return head


def _baseline(pooled: Pooled) -> tuple[str, float]:
    """(the most frequent class, the share of the images that always naming it gets right)."""
    rows = (pooled.record.test or {})["per_class"]
    largest = max(rows, key=lambda row: row["support"])
    return str(largest["name"]), largest["support"] / sum(row["support"] for row in rows)


def _header(pooled: Pooled) -> Html:
    record, folder = pooled.record, pooled.folder
    recipe = record.recipe
    badge = None if pooled.is_whole else el("span", f"{len(pooled.runs)} of {len(folder.members)} runs", class_="badge")
    times = "" if folder.repeats == 1 else f", {folder.repeats} times"
    about = (
        f"{recipe.backbone.name or recipe.backbone.weights} on {recipe.data.source}, {folder.k} folds{times}, data.seed {recipe.data.seed}"
    )
    return el(
        "header",
        el("h1", f"{recipe.name}, cross-validated", badge),
        el("div", recipe.purpose, class_="soft") if recipe.purpose else None,
        el("div", about, class_="soft"),
        el("p", verdict(pooled), class_="verdict"),
    )


def _figures(pooled: Pooled) -> list[tuple[str, str, str]]:
    test = pooled.record.test or {}
    if pooled.several:
        shown = labels.key_figures(test, [run for _, run in pooled.runs])
        return [*shown, ("Loss", decimal(number(test, "loss")), "binary cross entropy"), *_time(pooled)]
    name, share = _baseline(pooled)
    each = pooled.accuracies
    spread = f"standard deviation over {plural(len(each), 'run')}, {percent(each.min())} to {percent(each.max())}"
    items = [
        ("Accuracy", percent(pooled.accuracy.value), between(pooled.accuracy)),
        ("Baseline", percent(share), f"always saying {name}"),
        ("F1", percent(pooled.f1.value), f"mean over classes, {between(pooled.f1)}"),
        ("From fold to fold", points(pooled.spread), spread),
    ]
    if len(by_repeat := pooled.by_repeat) > 1:
        values = list(by_repeat.values())
        items.append(("From repeat to repeat", points(max(values) - min(values)), f"{percent(min(values))} to {percent(max(values))}"))
    if test["top5"] is not None and len(test["classes"]) > 10:  # of few classes it is always nearly right
        items.append(("Top-5 accuracy", percent(number(test, "top5")), "the true class is among the first five"))
    items.append(("Loss", decimal(number(test, "loss")), "cross entropy"))
    return [*items, *_time(pooled)]


def _time(pooled: Pooled) -> list[tuple[str, str, str]]:
    seconds = pooled.record.seconds
    return [("Time", duration(seconds), f"of {plural(len(pooled.runs), 'run')} together")] if math.isfinite(seconds) else []


def _runs(pooled: Pooled) -> Html:
    key, what = ("subset_accuracy", "Exact sets") if pooled.several else ("top1", "Accuracy")
    ends = [ends_of(run.test or {}, number(run.test or {}, key), int((run.test or {})["n"])) for _, run in pooled.runs]
    scale = axis(min(low for low, _ in ends), max(high for _, high in ends))
    low, high = max(0.0, scale.low), min(1.0, scale.high)
    rows = [_row(pooled, member, run, low, high) for member, run in pooled.runs]
    more = "mAP" if pooled.several else "ECE"
    head = ["Run", "Images", what, f"{100 * low:.0f} to {100 * high:.0f}\u202f%", "F1, mean", more, "Trained on", "Time"]
    repeats = pooled.folder.repeats
    means, below = ("mAP and F1", "The table of labels") if pooled.several else ("F1", "Confusion and confidence")
    kind = "the bootstrap over images" if repeats > 1 else f"Wilson's; for {means} the bootstrap over images"
    if (groups := pooled.predictions.group) is not None:
        kind = f"Wilson's for as many images as their {len(set(groups.tolist())):,} groups are worth; for {means} the bootstrap over groups"
    each, together = (" of each repeat", ", each with all of its predictions") if repeats > 1 else ("", "")
    counted = f" {below} below count{'s' if pooled.several else ''} every prediction." if repeats > 1 else ""
    note = (
        f"Each image stands in the test split of one fold{each}. The 95\u202f% interval of all images ({kind}) counts the luck of these "
        f"images{together}. It does not count the luck of what the networks learned from: two folds share most of their training images, "
        "and no interval from them alone is exact (Bengio and Grandvalet 2004). A network that learns from all images is "
        f"likely a little better.{counted}"
    )
    missing = [f"r{m.repeat}-f{m.fold}" for m in pooled.folder.members if m not in [member for member, _ in pooled.runs]]
    absent = el("p", f"Not finished: {', '.join(missing)}.", class_="note under") if missing else None
    return el("section", el("h2", "Each fold"), parts.table(head, rows, class_="wide"), el("p", note, class_="note under"), absent)


def _row(pooled: Pooled, member: Member, run: RunRecord, low: float, high: float) -> Sequence[str]:
    test = run.test or {}
    share, n, report = number(test, "subset_accuracy" if pooled.several else "top1"), int(test["n"]), run_dir.report_file(member.path)
    name = f"repeat {member.repeat}, fold {member.fold}" if pooled.folder.repeats > 1 else f"fold {member.fold}"
    where = escape.url(Path(os.path.relpath(report, pooled.folder.path)).as_posix()) if report.is_file() else None
    accuracy = join(percent(share), el("small", interval(share, n, test), class_="below"))
    cost = [count(run.num_images), duration(run.seconds)]
    mark = parts.strip(share, *ends_of(test, share, n), low, high, f"s{member.repeat % 8}")
    label = el("a", name, href=where) if where else name
    more = percent(number(test, "map")) if pooled.several else decimal(number(test, "ece"))
    return [label, count(n), accuracy, mark, percent(number(test, "f1_macro")), more, *cost]
