"""Ranking of a sweep's runs by val, with the test figure of the chosen one and the sentence on selection bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tltrain.core.metric import Metric, metric
from tltrain.core.output import escape
from tltrain.many.grid import Member
from tltrain.many.luck import SEEDS, luck_of
from tltrain.runs import run_dir
from tltrain.runs.listing.lines import RunLine, line_of, val_row
from tltrain.runs.listing.words import cut, short_duration, state_of
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.record import number
from tltrain.runs.report.formatting import decimal, metric_name, metric_value, percent, plural


@dataclass(frozen=True)
class Ran:
    """One run of a sweep, as far as it has come."""

    member: Member
    line: RunLine
    val: float
    """The metric that chooses, on val; NaN if it is not known."""
    num_val: int
    test: float
    """Accuracy on test."""


@dataclass(frozen=True)
class Choice:
    """Runs that differ in their seeds alone."""

    choice: tuple[str, ...]
    runs: tuple[Ran, ...]

    @property
    def values(self) -> list[float]:
        return [run.val for run in self.runs if math.isfinite(run.val)]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; NaN for fewer than two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    @property
    def name(self) -> str:
        return ", ".join(self.choice) or "the recipe"


@dataclass(frozen=True)
class Standing:
    """The runs of a sweep, or of one rung of it."""

    select: str
    choices: tuple[Choice, ...]

    @property
    def metric(self) -> Metric:
        return metric(self.select)

    @property
    def ranked(self) -> list[Choice]:
        """The choices whose every run has a value, the best first. Where a seed failed, the others would flatter."""
        whole = [each for each in self.choices if len(each.values) == len(each.runs)]
        return sorted(whole, key=lambda each: each.mean, reverse=self.metric.higher_is_better)


def read(members: Sequence[Member]) -> Standing:
    """Read the runs. Raises UserError for a metric that is not known."""
    ran = [_ran(each) for each in members]
    order = dict.fromkeys(each.choice for each in members)
    choices = (Choice(choice, tuple(run for run in ran if run.member.choice == choice)) for choice in order)
    return Standing(members[0].recipe.select, tuple(choices))


def _ran(member: Member) -> Ran:
    if not run_dir.recipe_file(member.path).is_file():
        nothing = RunLine(str(member.path), member.recipe.name, member.recipe.data.source, "new", *(math.nan, "", 0), *(math.nan,) * 4)
        return Ran(member, nothing, math.nan, 0, math.nan)
    line = line_of(member.path)
    if line.state != "finished":
        return Ran(member, line, math.nan, 0, line.test)
    row = val_row(member.recipe, read_rows(member.path)) or {}
    return Ran(member, line, number(row, member.recipe.select), int(row.get("n", 0)), line.test)


def verdict(standing: Standing, chosen_among: Standing) -> tuple[str, str]:
    """(the chosen recipe, with its val and test figures, how much of its lead is luck of choosing).

    chosen_among: the runs among which it was chosen; with halving those of the last rung that had several.
    """
    ranked, select = standing.ranked, standing.select
    if not ranked:
        return "No run has a value of val yet, so that none is chosen.", ""
    best = ranked[0]
    title = metric_name(select)
    many = len(best.runs) > 1
    if len(standing.choices) == 1 and chosen_among is standing:
        spread = f" (standard deviation {_amount(best.spread, standing.metric)})" if many else ""
        headline = (
            f"{plural(len(best.runs), 'run')} of one recipe: val {title} {metric_value(select, best.mean)} on average{spread}{_test(best)}."
        )
        return headline, "They differ in the seed alone. The best of them is the luckiest, and no better recipe: quote the average."
    how = f", the mean of {plural(len(best.runs), 'seed')}" if many else ""
    headline = f"Chosen by val: {best.name} with {title} {metric_value(select, best.mean)}{how}{_test(best)}."
    return headline, _luck(chosen_among)


def _test(best: Choice) -> str:
    tests = [run.test for run in best.runs if math.isfinite(run.test)]
    return f"; test accuracy {percent(float(np.mean(tests)))}" if tests else ""


def _amount(value: float, of: Metric) -> str:
    """A difference: points of a share, else a number."""
    return f"{100 * value:.1f} points" if of.is_share else decimal(value)


def _luck(standing: Standing) -> str:
    ranked, of = standing.ranked, standing.metric
    num_val = max((run.num_val for choice in ranked for run in choice.runs), default=0)
    luck = luck_of([choice.values for choice in ranked], of.higher_is_better, of.is_share, num_val)
    if luck is None:
        return "How much of its lead is luck is not known: repeat each over seeds, such as --over seed=0..2."
    measured = "" if luck.source == SEEDS else f", {num_val:,}; with --over seed=0..2 it is measured"
    told = (
        f"The best of {luck.num_choices} that were equally good would lead their mean by about {_amount(luck.expected, of)} by luck alone "
        f"(by {luck.source}{measured}); "
    )
    if _amount(abs(luck.lead), of) == _amount(0.0, of):
        return told + "this one does not lead: val tells no difference between them. The test figure was not chosen by, and is fair."
    told += f"this one leads by {_amount(luck.lead, of)}: "
    if luck.lead <= luck.expected:
        return told + "all of that may be luck of choosing. The test figure was not chosen by, and is fair."
    return told + f"up to {percent(luck.share, 0)} of that may be luck of choosing. The test figure was not chosen by, and is fair."


def table(standing: Standing, width: int) -> list[str]:
    """The runs as lines of a table, the best choice first; none wider than `width`."""
    several = any(len(choice.runs) > 1 for choice in standing.choices)
    ranked = [*standing.ranked, *(choice for choice in standing.choices if choice not in standing.ranked)]
    cells = [("run", f"val {standing.select}", "time", "state")]
    for choice in ranked:
        for run in choice.runs:
            cells.append((escape.line(run.member.name), _shown(standing, run.val), short_duration(run.line.time), state_of(run.line)))
        if several and len(choice.values) > 1:
            mean = f"{_shown(standing, choice.mean)}"
            cells.append(("  mean", mean, "", f"deviation {_amount(choice.spread, standing.metric)}"))
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    widths[0] = min(widths[0], max(12, width - sum(widths[1:]) - 6))
    return [f"{cut(a, widths[0]):{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in cells]


def _shown(standing: Standing, value: float) -> str:
    return "" if math.isnan(value) else metric_value(standing.select, value)
