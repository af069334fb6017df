"""`tltrain compare`: compares runs in a table on the terminal and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.core.output.console import Terminal
from tltrain.runs import run_dir
from tltrain.runs.folds.compared import compared_folds
from tltrain.runs.folds.folder import is_folds
from tltrain.runs.pages.compare_page import between, leaderboard, on_several, p_value, pairs_with_best, value_text, verdict
from tltrain.runs.pages.comparison import ComparedRun, compared_run, differing, grouped
from tltrain.runs.pages.write import write_entries
from tltrain.runs.record import number, read_run
from tltrain.runs.report.formatting import DASH, count, duration, ended, memory, percent, points
from tltrain.runs.report.stats import Interval
from tltrain.runs.report.tree import inside

_MOST_RECIPES, _MOST_VALUES = 4, 20  # of the table of what differs, on a terminal


def compare(paths: Sequence[Path], out: Path, title: str = "Comparison") -> Path:
    """Print the comparison of run folders, and write its page to `out`. Raises UserError."""
    if len(paths) < 2:
        raise UserError("one run cannot be compared; give two run folders or more")
    folds = [path for path in paths if is_folds(path)]
    if folds and len(folds) < len(paths):
        other = next(path for path in paths if path not in folds)
        raise UserError(
            f"{folds[0]} is a folder of folds, which is judged by all of its images, and {other} a run, judged by its test split; "
            "compare folds with folds"
        )
    of = compared_folds if folds else lambda name, path: compared_run(name, read_run(path))
    entries = [of(name, path) for name, path in zip(names(paths), paths, strict=True)]
    several = [entry.run.recipe.data.multilabel for entry in entries]
    if len(set(several)) > 1:
        raise UserError(
            f"{paths[several.index(True)]} is judged by sets of labels and {paths[several.index(False)]} by one class an image; "
            "neither is better than the other by that: compare runs of one kind"
        )
    Terminal(highlight=False).print(rendered(entries))
    return write_entries(entries, out, title)


def names(paths: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of the folders above it as tell it from the others."""
    parts = [path.absolute().parts for path in paths]
    # fit and distil call the run beside their recipe `run`
    depth = [2 if path.name == "run" and run_dir.recipe_file(path.parent).is_file() else 1 for path in paths]
    while True:
        short = [str(Path(*part[-n:])) for part, n in zip(parts, depth, strict=True)]
        others = [{part for part, other in zip(parts, short, strict=True) if other == name} for name in short]  # one folder twice is one
        again = [i for i in range(len(parts)) if len(others[i]) > 1 and depth[i] < len(parts[i])]
        if not again:
            return short
        for i in again:
            depth[i] += 1


def rendered(entries: Sequence[ComparedRun]) -> RenderableType:
    """The terminal's output: runs, groups of seeds, paired differences, recipes, and the verdict."""
    headline, why = verdict(entries)
    tables: list[RenderableType] = [_runs(entries), *_levels(entries), *_seeds(entries), *_pairs(entries), *_recipes(entries)]
    blocks: list[RenderableType] = [block for table in tables for block in (table, Text())]
    return Group(*blocks, Text(escape.line(headline), style="bold"), *([_name(why)] if why else []), Text())


def _runs(entries: Sequence[ComparedRun]) -> Table:
    several = on_several(entries)
    right = "all labels right" if all(e.run.recipe.data.multilabel for e in entries) else "top-1"
    table = _table("run", f"{right} (95 % interval)", "F1", "ECE", "time", *(["device time"] if several else []), "memory")
    for e in leaderboard(entries):
        cost = [duration(e.run.seconds), *([duration(e.device_seconds)] if several else []), memory(e.peak_bytes)]
        if e.run.test is None or e.accuracy is None:
            table.add_row(_name(e.name), _name(ended(e.run)), DASH, DASH, *cost)
            continue
        f1, ece = (percent(number(e.run.test, key)) for key in ("f1_macro", "ece"))
        table.add_row(_name(e.name), _figure(e.accuracy), f1, ece, *cost)
    return table


def _levels(entries: Sequence[ComparedRun]) -> list[Table]:
    """The accuracy at each level of a tree of classes."""
    judged = [(e.name, e.run.test["tree"], int(e.run.test["n"])) for e in leaderboard(entries) if e.run.test and "tree" in e.run.test]
    if not judged:
        return []
    most = max(len(of["levels"]) for _, of, _ in judged)
    table = _table("run", *(f"right at level {level}" for level in range(1, most + 1)), "mistakes inside the parent")
    for name, of, n in judged:
        shares = [percent(float(row["top1"])) for row in of["levels"]]
        table.add_row(_name(name), *shares, *([DASH] * (most - len(shares))), inside(of, n))
    return [table]


def _figure(figure: Interval) -> str:
    return f"{percent(figure.value)} ({between(figure)})"


def _seeds(entries: Sequence[ComparedRun]) -> list[Table]:
    groups = grouped(entries)
    if all(len(group.entries) == 1 for group in groups):
        return []
    right = "all labels right" if entries[0].run.recipe.data.multilabel else "top-1"
    table = _table("recipe", "seeds", f"{right}, mean", "standard deviation")
    for group in groups:
        table.add_row(_name(group.name), count(len(group.accuracies)), percent(group.mean), points(group.spread))
    return [table]


def _pairs(entries: Sequence[ComparedRun]) -> list[Table]:
    pairs = pairs_with_best(entries)
    if not pairs:
        return []
    table = _table("against the best", "points (95 % interval)", "only best right", "only it right", "p")
    for pair in pairs:
        gain = f"{100 * pair.gain.value:+.1f} ({100 * pair.gain.low:+.1f} to {100 * pair.gain.high:+.1f})"
        shown = [gain, count(pair.only_first), count(pair.only_second), p_value(pair.p).removeprefix("p ").removeprefix("= ")]
        table.add_row(_name(pair.second.name), *shown)
    return [table]


def _recipes(entries: Sequence[ComparedRun]) -> list[RenderableType]:
    groups = grouped(entries)
    rows = differing(groups)
    if not rows:
        return []
    if len(groups) > _MOST_RECIPES or len(rows) > _MOST_VALUES:
        return [Text(f"the {len(groups)} recipes differ in {len(rows)} values: the page lists them")]
    table = _table("recipe value", *(group.name for group in groups))
    for path, values in rows:
        table.add_row(_name(path), *(_name(value_text(value)) for value in values))
    return [table]


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(_name(first), overflow="fold")
    for head in others:
        table.add_column(_name(head), justify="right", overflow="fold")
    return table


def _name(text: str) -> Text:
    return Text(escape.line(text))
