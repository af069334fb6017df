"""The report page of one run: result, learning curves, errors, calibration, preview, plan and environment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

from tltrain.core import registry
from tltrain.core.metric import metric
from tltrain.core.recipe import Stage
from tltrain.runs.pages import background, distilled
from tltrain.runs.pages.doubts import doubts
from tltrain.runs.record import RunRecord, number, read_predictions, read_race
from tltrain.runs.report import confidence, labels, learning, tree
from tltrain.runs.report import tables as parts
from tltrain.runs.report.charts import Axis, Line, Point, Span, axis, line_chart, log_axis, thinned, uneven
from tltrain.runs.report.formatting import (
    DASH,
    count,
    decimal,
    duration,
    ended,
    interval,
    intervals,
    metric_name,
    metric_value,
    percent,
    plural,
    verdict,
)
from tltrain.runs.report.html import Html, el, join, page
from tltrain.runs.report.stats import f1_interval

_X_LABEL = "optimizer steps"
_MOST_POINTS = 120  # of one curve in one stage; more would only show noise


def report(run: RunRecord, links: Html | None = None) -> str:
    """The HTML page of a run. links: to the pages that lie beside it."""
    return page(
        f"{run.recipe.name} {DASH} tltrain",
        _header(run),
        parts.figures(_figures(run)),
        el("p", intervals(run.test), class_="note under") if run.test else None,
        links,
        distilled.section(run),
        _learning(run),
        labels.by_label(run),
        errors(run),
        mistakes(run),
        confidence.calibration(run),
        doubts(run),
        background.images(run),
        background.seen(run),
        background.details(run),
    )


def _header(run: RunRecord) -> Html:
    how = ended(run)
    badge = None if how == "finished" else el("span", how, class_="badge")
    recipe = run.recipe
    backbone = recipe.backbone.name or recipe.backbone.weights
    about = f"{backbone} on {recipe.data.source}, seed {recipe.seed}"
    if run.rows:
        about += f", {datetime.fromtimestamp(run.rows[-1]['time'], UTC):%d %B %Y %H:%M} UTC"
    error = (run.outcome or {}).get("error")
    return el(
        "header",
        el("h1", recipe.name, badge),
        el("div", recipe.purpose, class_="soft") if recipe.purpose else None,
        el("div", about, class_="soft"),
        el("p", verdict(run), class_="verdict"),
        el("pre", str(error), class_="error") if error else None,
    )


def _figures(run: RunRecord) -> list[tuple[str, str, str]]:
    items = labels.figures(run)
    if (test := run.test) is not None and not items:
        n = int(test["n"])
        largest = max(test["per_class"], key=lambda r: r["support"])
        items.append(
            ("Test accuracy", percent(number(test, "top1")), f"{interval(number(test, 'top1'), n, test)}; {test['weights']} weights")
        )
        items.append(("Baseline", percent(largest["support"] / n), f"always saying {largest['name']}"))
        if math.isfinite(number(test, "top5")) and len(test["classes"]) > 10:
            items.append(("Test top-5 accuracy", percent(number(test, "top5")), "the true class is among the first five"))
        items.append(("Test F1", percent(number(test, "f1_macro")), f"mean over classes{_f1_ends(run)}"))
        items.append(("Test loss", decimal(number(test, "loss")), "cross entropy"))
        others = [name for name in registry.names("metrics") if name not in registry.KINDS["metrics"]]
        items += [(f"Test {metric_name(name)}", metric_value(name, number(test, name)), "") for name in others if name in test]
    if (best := run.best) is not None:
        select = run.recipe.select
        where = f"stage {best['stage']}, step {count(best['step'])}"
        items.append((f"Best val {metric_name(select)}", metric_value(select, number(best, select)), where))
    for row in run.of_kind("teacher")[-1:]:
        what, key = ("mAP", "map") if run.recipe.data.multilabel else ("accuracy", "top1")
        items.append((f"Teacher's {what}", percent(number(row, key)), f"on {plural(int(row['n']), 'val image')}"))
    if run.num_steps:
        solved = len(run.of_kind("solve"))
        steps = f"{plural(run.num_steps - solved, 'step')} of {run.recipe.batch}, repeats counted{', and a solved head' if solved else ''}"
        steps = steps if run.num_steps > solved else "each once, for a solved head"
        items.append(("Images trained on", count(run.num_images), steps))
    if math.isfinite(run.seconds):
        items.append(("Time", duration(run.seconds), "" if ended(run) == "finished" or run.test else "of the stages that ended"))
    return items


def _f1_ends(run: RunRecord) -> str:
    predicted = read_predictions(run.path)
    if predicted is None:
        return ""
    _, low, high = f1_interval(predicted.label, predicted.predicted, group_N=predicted.group)
    return f", {100 * low:.1f}\u00a0to\u00a0{100 * high:.1f}\u202f%"


def _learning(run: RunRecord) -> Html | None:
    train, val = run.of_kind("train"), run.of_kind("val")
    if not train and not val:
        return None
    spans = _spans(run)
    if not train and run.of_kind("solve"):  # before and after is no curve
        return el("section", el("h2", "Learning"), _stage_table(run))
    curves = (_loss_chart(run, spans), _select_chart(run, spans), _lr_chart(run, spans), *map(_blend_chart, run.of_kind("blend")))
    charts = [chart for chart in curves if chart is not None]
    stages = el("div", el("h3", "Stages"), _stage_table(run), class_="gap")
    return el("section", el("h2", "Learning"), el("div", *charts, class_="pair"), stages)


def _spans(run: RunRecord) -> list[Span]:
    """The stages that have started, as ranges of optimizer steps over the whole run."""
    ends = list(accumulate(run.stage_steps))
    spans = [Span(s.name, end - n, end) for s, end, n in zip(run.recipe.stages, ends, run.stage_steps, strict=True)]
    return [span for span in spans if span.stop > span.start]


def _curve(run: RunRecord, kind: str, key: str) -> list[Point]:
    """The curve of one metric, with a gap between stages, since a stage may start from other weights than the last step's."""
    points: list[Point] = []
    for i in range(len(run.recipe.stages)):
        stage = [(float(run.at(row)), number(row, key)) for row in run.of_kind(kind) if row["stage_index"] == i]
        if points and stage:
            points.append((stage[0][0], math.nan))
        points += thinned(stage, _MOST_POINTS)
    return points


def _finite(points: list[Point]) -> list[float]:
    return [y for _, y in points if math.isfinite(y)]


def _loss_chart(run: RunRecord, spans: list[Span]) -> Html | None:
    lines = [line for line in (Line("train", _curve(run, "train", "loss"), "s0"), *_val_lines(run, "loss")) if _finite(list(line.points))]
    if not lines:
        return None
    values = [y for line in lines for y in _finite(list(line.points))]
    broken = [row for row in run.of_kind("train") if not math.isfinite(number(row, "loss"))]
    title = "Val loss" if lines[0].label != "train" else "Loss"
    if lines[0].label == "train" and (taught := learning.of_features(run.recipe)):
        title += f" ({taught})"
    title += f" (not finite at step {run.at(broken[0])})" if broken else ""
    y = axis(0, max(values))
    if uneven(values):  # a teacher's loss begins far above what is reached
        y, title = log_axis(min(values), max(values)), f"{title}, logarithmic"
    return line_chart(title, lines, y, learning.short, x_label=_X_LABEL, x_top=run.num_steps, spans=spans)


def _select_chart(run: RunRecord, spans: list[Span]) -> Html | None:
    select = run.recipe.select_beside_loss
    lines = [line for line in _val_lines(run, select) if _finite(list(line.points))]
    values = [value for line in lines for value in _finite(list(line.points))]
    values += [number(row, select) for row in run.of_kind("blend") if math.isfinite(number(row, select))]
    if not lines:
        return None
    y, unit, scale = axis(min(values), max(values)), "", 1
    if metric(select).is_share:
        y = Axis(max(0.0, y.low), min(1.0, y.high), [t for t in y.ticks if -1e-9 <= t <= 1 + 1e-9])
        unit, scale = ", %", 100
    best = None
    if (row := run.best) is not None and math.isfinite(number(row, select)):
        best = ((float(run.at(row)), number(row, select)), f"best weights, {metric_value(select, number(row, select))}")
    title = f"Val {metric_name(select)}{unit}"
    return line_chart(title, lines, y, lambda v: f"{scale * v:.4g}", x_label=_X_LABEL, x_top=run.num_steps, spans=spans, best=best)


def _val_lines(run: RunRecord, key: str) -> list[Line]:
    """The curves of one val metric: of the weights that `select` looks at, and where a stage keeps an average, of the other ones."""
    kinds = (("val", "", "s1"), ("val, average", "ema_", "s3"), ("val, not averaged", "last_", "s4"))
    return [Line(label, _curve(run, "val", f"{prefix}{key}"), style, dots=True) for label, prefix, style in kinds]


def _blend_chart(row: Mapping[str, Any]) -> Html:
    """Val loss of the blends of a stage's start and end."""
    points = [(100 * float(share), float(loss)) for share, _, loss in row["curve"]]
    values = _finite(points)
    best = ((100 * number(row, "share"), number(row, "loss")), f"handed on: {number(row, 'share'):.0%} of the end")
    y, title = axis(min(values), max(values)), f"Val loss between start and end of stage {row['stage']}"
    return line_chart(
        title, [Line("val", points, "s1", dots=True)], y, lambda v: f"{v:.4g}", x_label="share of the end, %", x_top=100, best=best
    )


def _lr_chart(run: RunRecord, spans: list[Span]) -> Html | None:
    points = _curve(run, "train", "lr")
    values = [y for y in _finite(points) if y > 0]
    if not values:
        return None
    peaks = [stage.lr for stage in run.recipe.stages[: len(spans)] if stage.lr is not None]
    log = max(peaks) >= 8 * min(peaks)
    y = log_axis(min(peaks) / 30, max(*values, min(peaks))) if log else axis(0, max(values))
    points = [(px, py if py >= y.low else math.nan) for px, py in points]  # a logarithmic axis cannot show 0
    title = "Learning rate of the head" + (", logarithmic" if log else "")
    lines = [Line("lr", points, "s2")]
    return line_chart(title, lines, y, lambda v: f"{v:.3g}".replace("e-0", "e-"), x_label=_X_LABEL, x_top=run.num_steps, spans=spans)


def _peak(stage: Stage) -> str:
    """The peak learning rate of a stage, or how its head is worked out."""
    return (stage.solve or "").replace("_", " ") if stage.lr is None else f"{stage.lr:.3g}"


def _stage_table(run: RunRecord) -> Html:
    select = run.recipe.select
    rows, before = list[list[str | None]](), 0.0
    for i, stage in enumerate(run.recipe.stages):
        own = [row for row in run.rows if row["stage_index"] == i and row["kind"] != "teacher"]
        end = next((row for row in own if row["kind"] == "stage_end"), None)
        values = [number(row, select) for row in own if row["kind"] == "val" and math.isfinite(number(row, select))]
        best = (max if metric(select).higher_is_better else min)(values, default=math.nan)
        how = {"finished": "in full", "early": "early"}.get(end["reason"], end["reason"]) if end else "not ended" if own else "not started"
        time = duration(number(end, "seconds") - before) if end else DASH  # stage_end rows hold the seconds of the whole run so far
        before = number(end, "seconds") if end else math.nan
        rows.append([stage.name, stage.unfreeze, _peak(stage), count(run.stage_steps[i]), how, time, metric_value(select, best)])
    table = parts.table(["Stage", "Trains from", "Peak lr", "Steps", "Ended", "Time", "Best val"], rows, texts=2)
    texts = [f"{stage}: {sentence}." for stage, sentence in read_race(run.path).items()]
    texts += [f"{row['stage']} was worked out, not trained: {'; '.join(map(str, row['notes']))}." for row in run.of_kind("solve")]
    if kept := [row["stage"] for row in run.of_kind("stage_end") if row.get("unchanged")]:
        texts.append(
            f"On val nothing that {' and '.join(kept)} trained was better than the weights it started from, so it handed on those."
        )
    return join(table, *(el("p", text, class_="note under") for text in texts))


def errors(run: RunRecord) -> Html | None:
    """The section on where a run errs. None without a test."""
    if run.test is None or "confusion" not in run.test:
        return None
    matrix, classes = run.test["confusion"], [str(c) for c in run.test["classes"]]
    in_tree = run.recipe.data.depth is not None
    frequent = parts.frequent_mistakes(matrix, classes) if len(classes) > 12 else None  # a small matrix shows them by itself
    left = el("div", el("h3", "Confusion"), parts.confusion(matrix, classes, in_tree))
    pairs = el("div", el("h3", "Most frequent mistakes"), frequent) if frequent else None
    by_class = el("div", el("h3", "By class"), parts.per_class(run.test["per_class"], in_tree))
    wide = parts.confusion_is_wide(matrix, classes, in_tree)
    parted = el("div", pairs, by_class, class_="pair gap") if wide else None
    grid = join(left, parted) if wide else el("div", el("div", left, pairs), by_class, class_="pair long")
    return join(el("section", el("h2", "Where it errs"), grid), tree.section(run.test))


def mistakes(run: RunRecord) -> Html | None:
    """The section of the most confident mistakes. None without any."""
    if not run.mistakes:
        return None
    text = "The image as the network saw it, the predicted class with its confidence, the true class, and the file."
    if any("missed" in item for item in run.mistakes):
        text = (
            "The image as the network saw it, the labels that it said and the image does not have, those that it missed, each with its "
            "probability, and the file. The surest wrong answer comes first. Labels that it got right are not listed."
        )
    if any("lit" in item for item in run.mistakes):
        text += " Beside it, what spoke for its answer is lit, and the rest is in shade (Grad-CAM)."
    right = None
    if run.right_answers:
        right = el("div", el("h3", "The right answers that it is surest of"), parts.examples(run.right_answers), class_="gap")
    return el("section", el("h2", "Its most confident mistakes"), el("p", text, class_="note"), parts.examples(run.mistakes), right)
