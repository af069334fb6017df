"""`tltrain soup`: averages the weights of runs, and prints what each average gave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tltrain.core.errors import Parser, UserError
from tltrain.core.metric import metric
from tltrain.core.output import escape, wrapping
from tltrain.core.output.console import Terminal
from tltrain.core.paths import check_run
from tltrain.runs.report.formatting import plural

if TYPE_CHECKING:
    from tltrain.training.weights.soup import Measured, Soup

METHODS = ("greedy", "uniform")


def cook(parser: Parser, argv: Sequence[str]) -> int:
    """Average runs, write a folder, and print a table, or everything as JSON. Raises UserError."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished runs of one network and data set")
    parser.add_argument("--out", type=Path, required=True, help="a new run folder for the averaged weights")
    parser.add_argument(
        "--method", choices=METHODS, default="greedy", help="greedy: the runs that val is not worse with (default); uniform: all"
    )
    parser.add_argument("--test", action="store_true", help="measure on test too")
    parser.add_argument("--batch", type=int, default=128, help="images a device holds (default: 128)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_args(argv)
    if arguments.batch < 1:
        raise UserError(f"--batch is {arguments.batch}; it must be at least 1")
    for run in arguments.runs:
        check_run(run)
    from tltrain.training.weights.soup import soup  # torch comes with it, which help does without

    done = soup(arguments.runs, arguments.out, arguments.method, arguments.test, arguments.batch)
    if arguments.json:
        print(json.dumps(asdict(done), indent=1, default=str))
        return 0
    Terminal(highlight=False).print(rendered(done))
    if done.method == "greedy" and len(done.kept) == 1:
        wrapping.say(f"note    no other run makes {escape.line(done.kept[0])} better on val: the greedy soup is that run")
    num_runs = len(done.kept) if done.method == "greedy" else len(done.rows) - 2
    print(f"soup    {done.method}, of {plural(num_runs, 'run')}: {escape.line(str(done.folder))}")
    return 0


def rendered(done: Soup) -> Table:
    """A row for each run and each average: the metric that selects and the loss, on val and where asked for on test."""
    names = list(dict.fromkeys([done.select, "loss"]))
    tested = done.rows[0].test is not None
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("weights", overflow="fold")  # whole: two runs may differ in their last sign
    for split in ("val", "test") if tested else ("val",):
        for name in names:
            table.add_column(f"{split} {metric(name).title or name}", justify="right")
    table.add_column("in greedy")
    for row in done.rows:
        cells = [_value(figures, name) for figures in (row.val, row.test) if figures is not None for name in names]
        table.add_row(Text(escape.line(row.name)), *cells, _place(row, done))
    return table


def _value(figures: dict[str, Any], name: str) -> str:
    if figures[name] is None:  # such as the mean over labels that no image of the split has
        return "\u2013"
    return f"{100 * figures[name]:.2f} %" if metric(name).is_share else f"{figures[name]:.4f}"


def _place(row: Measured, done: Soup) -> str:
    return str(1 + done.kept.index(row.name)) if row.name in done.kept else ""
