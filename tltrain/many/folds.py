"""`tltrain folds`: trains a recipe once for each fold, and puts together what the networks say of images that they never saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output import escape
from tltrain.core.output.console import Terminal, one_plan
from tltrain.core.recipe import Recipe
from tltrain.data import open_images
from tltrain.data.splits import split
from tltrain.many.one_by_one import OneRun, train_one_by_one
from tltrain.many.side_by_side import jobs_at_a_time, train_side_by_side
from tltrain.runs.folds import folder, page
from tltrain.runs.folds.folder import FoldsFolder
from tltrain.runs.folds.pooled import Pooled, pool
from tltrain.runs.record import number
from tltrain.runs.report.formatting import count, duration, finished_of, interval, percent, points
from tltrain.training.depths.hidden import check_weights


def run_folds(wanted: FoldsFolder, parsed: Sequence[tuple[Recipe, RunFlags]], jobs: int | None) -> str:
    """Train every fold that is not finished, then write the page. Returns finished, stopped or failed. Raises UserError.

    parsed: the recipe and the flags of each of `wanted.members`. jobs: folds at a time; None: one a GPU, else one.
    """
    jobs = jobs_at_a_time("folds", jobs)
    recipes = [recipe for recipe, _ in parsed]
    folder.check(wanted, recipes)
    _check_data(recipes)
    folder.create(wanted)
    say = Terminal(highlight=False, soft_wrap=True).print
    runs = [OneRun(str(start.folder and start.folder.name), recipe, start) for recipe, start in folder.unfinished(wanted, parsed)]
    if num_finished := len(wanted.members) - len(runs):
        say(f"folds   {finished_of(num_finished, len(wanted.members))} already", markup=False)
    outcome = "finished"
    if runs and jobs > 1:
        outcome = train_side_by_side(runs, min(jobs, len(runs)), wanted.path / "logs", lambda text: say(text, markup=False))
    elif runs:
        with one_plan():
            outcome = train_one_by_one(runs, lambda text: say(f"\n{text}", style="bold", markup=False))
    show(wanted.path)
    return outcome


def show(path: Path) -> Path | None:
    """Write the page of a folder, and print what it says. None if no run has been tested yet. Raises UserError."""
    pooled = pool(path)
    if pooled is None:
        return None
    where = page.write(pooled)
    terminal = Terminal(highlight=False)
    terminal.print()
    terminal.print(_table(pooled))
    terminal.print()
    terminal.print(page.verdict(pooled), style="bold", markup=False)
    terminal.print(f"page    {escape.line(str(where))}", markup=False, soft_wrap=True)
    terminal.print(f"table   {escape.line(str(path / page.TABLE))}", markup=False, soft_wrap=True)
    return where


def _table(pooled: Pooled) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run")
    right, key, other, other_key = ("top-1", "top1", "ECE", "ece")
    if pooled.several:
        right, key, other, other_key = ("all labels right", "subset_accuracy", "mAP", "map")
    for head in ("images", f"{right} (95 % interval)", "F1", other, "time"):
        table.add_column(head, justify="right")
    for member, run in pooled.runs:
        test = run.test or {}
        share, n = number(test, key), int(test["n"])
        figures = [percent(number(test, name)) for name in ("f1_macro", other_key)]
        table.add_row(member.path.name, count(n), f"{percent(share)} ({interval(share, n)})", *figures, duration(run.seconds))
    test, n = pooled.record.test or {}, len(pooled.predictions.ids)
    low, high = 100 * pooled.accuracy.low, 100 * pooled.accuracy.high
    together = [f"{percent(pooled.accuracy.value)} ({low:.1f} to {high:.1f} %)", percent(pooled.f1.value), percent(number(test, other_key))]
    table.add_row("together", count(n), *together, duration(pooled.record.seconds), style="bold")
    if len(pooled.runs) > 1:
        spread = ["", "", points(pooled.spread)] if pooled.several else [points(pooled.spread), "", ""]
        table.add_row("deviation", "", *spread, "")
    return table


def _check_data(recipes: Sequence[Recipe]) -> None:
    """Draw the splits of every fold, so that one which cannot be trained is refused before the first. Raises UserError."""
    first = open_images(recipes[0].data)
    check_weights(recipes[0], first, "begin with weights that have not seen them")
    for recipe in recipes[1:] if first.source is not None else ():
        assert first.source is not None
        try:
            split(first.source, recipe.data)
        except UserError as error:
            raise UserError(f"fold {recipe.data.fold} of repeat {recipe.data.repeat}: {error}") from error
