"""The tables of a measurement for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.table import Table
from rich.text import Text

from tltrain.core.output import escape
from tltrain.data.corruptions import SEVERITIES
from tltrain.evaluation.robustness.figures import Difference, Figures, head_of_shares, kind_of, title
from tltrain.runs.report.formatting import tenths
from tltrain.runs.report.stats import Interval


def table(figures: Figures) -> Table:
    """A row for each corruption, a column for each severity."""
    severities = [s for s in SEVERITIES if s in figures.overall.by_severity]
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column(figures.right.lower())
    for head in (*map(str, severities), "mean", "95 % interval"):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_row("Clean", *[""] * len(severities), tenths(figures.clean.value), _ends(figures.clean), end_section=True)
    for _, rows in groupby(figures.rows, key=lambda row: kind_of(row.name)):
        for row in rows:
            shown.add_row(title(row.name), *(tenths(row.by_severity[s].value) for s in severities), tenths(row.mean.value), _ends(row.mean))
    if len(figures.rows) > 1:
        overall = figures.overall
        cells = [tenths(overall.by_severity[s].value) for s in severities]
        shown.add_row("All, mean", *cells, tenths(overall.mean.value), _ends(overall.mean), style="bold")
    return shown


def differences(rows: Sequence[Difference], first: str, second: str, several: bool) -> Table:
    """A row for each corruption: both accuracies, and their paired difference. several: as of `head_of_shares`."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column(head_of_shares(several).lower())
    for head in (first, second):
        shown.add_column(Text(escape.line(head)), justify="right", overflow="fold", max_width=16)
    shown.add_column("points (95 % interval)", justify="right", no_wrap=True)
    shown.add_column("p", justify="right", no_wrap=True)
    for row in rows:
        gain = f"{100 * row.gain.value:+.1f} ({100 * row.gain.low:+.1f} to {100 * row.gain.high:+.1f})"
        name = {"all": "All, mean"}.get(row.name, title(row.name))
        style = "bold" if row.name == "all" else None
        shown.add_row(name, tenths(row.first), tenths(row.second), gain, "< .001" if row.p < 0.001 else f"{row.p:.3f}", style=style)
    return shown


def _ends(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
