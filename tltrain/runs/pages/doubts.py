"""The section of a run's page on what the network does not know: sets of classes, and answers that are withheld."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tltrain.runs.record import RunRecord
from tltrain.runs.report import tables as parts
from tltrain.runs.report.charts import Axis, Line, axis, line_chart
from tltrain.runs.report.formatting import DASH, count, percent, plural, tenths
from tltrain.runs.report.html import Html, el
from tltrain.runs.report.stats import ends_of
from tltrain.uncertainty import abstain, conformal
from tltrain.uncertainty.answers import GROUPED, Val

FITTED = (
    "Both are fitted on val and shown on test. They hold for images like those of val. Val also chose the weights and the temperature, "
    "which flatters it a little: the test figures count."
)


def doubts(run: RunRecord) -> Html | None:
    """The section. None for a run without val, and for one of an older version."""
    test = run.test or {}
    sets, rules, curve = test.get("sets"), test.get("abstain"), test.get("answered_curve")
    if not curve or sets is None or rules is None:
        return None
    val = _val(test)
    promised = [rule for rule in rules if abstain.large_enough(val.worth, rule["target"])]
    blocks = [_sets(sets, run.recipe.data.depth is not None) if sets else _no_sets(val), _answers(promised, curve, val)]
    alike = "" if val.groups is None else f" But {GROUPED.format(val.groups)}."
    fitted = el("p", FITTED + alike, class_="note") if sets or promised else None
    return el("section", el("h2", "What it does not know"), fitted, el("div", *blocks, class_="pair"))


def _val(test: Mapping[str, Any]) -> Val:
    """The size of val. Older runs record it only beside their rules: without any, val had fewer images than a coverage takes."""
    if (said := test.get("fitted_on")) is not None:
        return Val(**said)
    known = [*((row["num_val"], row.get("num_groups")) for row in test["sets"])]
    known += [(row["val"]["n"], row.get("num_groups")) for row in test["abstain"]]
    return Val(*known[0]) if known else Val(conformal.least_images(conformal.LEVELS[0]) - 1)


def _no_sets(val: Val) -> Html:
    return el("div", el("h3", "Sets of classes"), el("p", f"{_capital(val)}, too few to promise a coverage: {_narrow(conformal.needs())}."))


def _narrow(text: str) -> str:
    return text.replace(" %", "\u202f%")


def _capital(val: Val) -> str:
    return f"{val}".replace("val", "Val", 1)


def _sets(sets: Sequence[Mapping[str, Any]], tree: bool) -> Html:
    text = (
        "tltrain predict --coverage gives each image the classes whose probability reaches a threshold, and always the most probable "
        "one. The promise is one for all images together: a class may be covered less. The second column says what it comes to by the "
        f"luck of which {plural(int(sets[0]['num_val']), 'image')} are in val."
    )
    rows = []
    for row in sets:
        low, high = row["between"]
        test = tenths(row["covered"] / row["n"]), _ends(row, row["covered"], row["n"])
        rows.append([percent(row["coverage"], 0), f"{100 * low:.0f} to {100 * high:.0f}", *test, f"{row['mean_size']:.2f}"])
    head = ["Promised", "Luck of val,\u00a0%", "Test,\u00a0%", "95\u202f%", "Classes"]
    first = sets[0]
    known = [str(c["name"]) for c in first["per_class"]]
    names = dict(zip(known, parts.short(known, tree), strict=True))
    by_class = [
        [
            el("span", names[c["name"]], title=str(c["name"])),
            count(c["n"]),
            tenths(c["covered"] / c["n"]),
            _ends(c, c["covered"], c["n"]),
            f"{c['mean_size']:.2f}",
        ]
        for c in sorted(first["per_class"], key=lambda c: c["covered"] / c["n"])
    ]
    return el(
        "div",
        el("h3", "Sets of classes"),
        el("p", text, class_="note"),
        parts.table(head, rows),
        el("h3", f"By class, {percent(first['coverage'], 0)} promised", class_="gap"),
        parts.table(["Class", "Images", "Test,\u00a0%", "95\u202f%", "Classes"], by_class, class_="tall"),
    )


def _answers(rules: Sequence[Mapping[str, Any]], curve: Sequence[tuple[float, float]], val: Val) -> Html:
    text = "tltrain predict --abstain answers where the confidence is above a threshold, the one that reaches the wanted accuracy on val."
    points = [(100 * share, accuracy) for share, accuracy in curve]
    y = axis(min(0.95, *(accuracy for _, accuracy in curve)), 1.0)  # where all answers are right too
    y = Axis(max(0.0, y.low), 1.0, [t for t in y.ticks if -1e-9 <= t <= 1 + 1e-9])
    answering = [rule for rule in rules if rule["answered"]]
    chosen = None
    if answering:  # the strictest
        rule = answering[-1]
        point = 100 * rule["answered"] / rule["n"], rule["right"] / rule["answered"]
        chosen = point, f"where {percent(rule['target'], 0)} are wanted"
    chart = line_chart(
        "Accuracy of the answers, %",
        [Line("", points, "s1")],
        y,
        lambda v: f"{100 * v:.4g}",
        x_label="images answered, %",
        x_top=100,
        best=chosen,
    )
    rows = []
    for rule in rules:
        answered, right = int(rule["answered"]), int(rule["right"])
        shown = [tenths(right / answered), _ends(rule, right, answered)] if answered else [DASH, DASH]
        rows.append([percent(rule["target"], 0), tenths(rule["least"]), tenths(answered / rule["n"]), *shown])
    head = ["Wanted", "Promised, %", "Answered, %", "Right, %", "95\u202f%"]
    if not abstain.large_enough(val.worth):
        none = f"{_capital(val)}, too few to promise anything of answers withheld: {_narrow(abstain.needs())}."
        return el("div", el("h3", "Answers withheld"), chart, el("p", none, class_="under"))
    table = parts.table(head, rows) if rows else el("p", "No threshold reaches 90\u202f% on val.")
    promise = (
        "Promised: at least so many of the answers are right, with 95\u202f% confidence (Clopper and Pearson's bound, for all of the "
        "twenty thresholds that were looked at)."
    )
    return el("div", el("h3", "Answers withheld"), el("p", text, class_="note"), chart, table, el("p", promise, class_="note under"))


def _ends(row: Mapping[str, Any], part: int, of: int) -> str:
    low, high = ends_of(row, part / of, of)
    return f"{100 * low:.1f} to {100 * high:.1f}"
