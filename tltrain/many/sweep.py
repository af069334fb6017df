"""`tltrain sweep`: trains every combination of some values, and says which is best and how much of that is luck."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.core.output.console import Terminal
from tltrain.data import open_images
from tltrain.many import grid, sweep_page
from tltrain.many.grid import Member, Rung
from tltrain.many.one_by_one import OneRun, train_one_by_one
from tltrain.many.side_by_side import jobs_at_a_time, train_side_by_side
from tltrain.many.standing import Standing, read, table, verdict
from tltrain.runs import run_dir
from tltrain.runs.report.formatting import finished_of, plural


def run_sweep(members: Sequence[Member], halving: int | None, jobs: int | None) -> str:
    """Train what is not finished, rung by rung, then print the table and write the page. Returns finished, stopped or failed.

    halving: one in so many choices goes on to the next rung; None: all train at full length. jobs: runs at a time; None: one a GPU, else
    one. Raises UserError.
    """
    jobs = jobs_at_a_time("sweep", jobs)
    check(members)
    if halving is not None and open_images(members[0].recipe.data).val is None:
        raise UserError("--halving chooses by val, and there is no val split; set data.val_fraction above 0")
    terminal = Terminal(highlight=False, soft_wrap=True)
    for rung, left in climbed(members, halving):
        check(left)
        if rung is not None:
            terminal.print(rung_line(rung, left), style="bold", markup=False)
        runs = [OneRun(each.name, each.recipe, each.start) for each in unfinished(left)]
        if num_finished := len(left) - len(runs):
            terminal.print(f"sweep   {finished_of(num_finished, len(left))} already", markup=False)
        outcome = _train(runs, jobs, left[0].path.parent / "logs", terminal) if runs else "finished"
        if outcome == "stopped":
            if jobs > 1:  # one by one, the run that was stopped says so
                terminal.print("the same command goes on from there", markup=False)
            return outcome
    show(members, halving, terminal)
    return outcome


def submit_sweep(members: Sequence[Member], halving: int | None, own: Sequence[str], command: Sequence[str]) -> int:
    """Submit what is not finished as a job array, with halving of the first rung that is not. Where all is finished, show the table.

    own: options of `tltrain launch slurm`. command: what the user typed. Returns the exit code. Raises UserError.
    """
    from launcher.command import Training
    from launcher.slurm.array import submit_array

    for rung, left in climbed(members, halving):
        check(left)
        waiting = [replace(each, start=replace(each.start, folder=each.path.absolute())) for each in unfinished(left)]
        if waiting:
            if rung is not None:
                print(rung_line(rung, left).strip())
            runs = [Training(each.recipe, each.start, each.path) for each in waiting]
            code = submit_array(waiting[0].path.parent, runs, own, command)
            print("when they are finished, the same command goes on, and shows what was chosen in the end")
            return code
    show(members, halving, Terminal(highlight=False, soft_wrap=True))
    return 0


def _train(runs: Sequence[OneRun], jobs: int, logs: Path, terminal: Terminal) -> str:
    if jobs > 1:
        return train_side_by_side(runs, min(jobs, len(runs)), logs, lambda text: terminal.print(text, markup=False), past_failures=True)
    return train_one_by_one(runs, lambda text: terminal.print(f"\n{text}", style="bold", markup=False), past_failures=True)


def climbed(members: Sequence[Member], halving: int | None) -> Iterator[tuple[Rung | None, list[Member]]]:
    """The rungs, each with its runs: as soon as a rung is asked for, the one before it must have been trained. Raises UserError.

    Without halving it is one, of all members. A choice that failed goes no further.
    """
    if halving is None:
        yield None, list(members)
        return
    left = list(members)
    for rung in grid.rungs(len({each.choice for each in members}), halving):
        runs = [grid.on_rung(each, rung) for each in left]
        yield rung, runs
        best = [each.choice for each in read(runs).ranked][: rung.keep]
        if not best:
            raise UserError(f"no run of {rung.name} has a value of val to choose by; look into {runs[0].path.parent}")
        left = [each for each in left if each.choice in best]


def unfinished(members: Sequence[Member]) -> list[Member]:
    """Those that have not finished. One that failed begins again: the reason may be gone."""
    return [each for each in members if run_dir.outcome(each.path).get("outcome") != "finished"]


def check(members: Sequence[Member]) -> None:
    """Refuse, before the first run begins, folders that hold other runs. Raises UserError."""
    parent = members[0].path.parent
    if run_dir.recipe_file(parent).is_file():
        raise UserError(f"{parent} is the folder of a run; choose another for the sweep with --folder")
    for each in members:
        run_dir.check_recipe(each.path, each.recipe)


def rung_line(rung: Rung, left: Sequence[Member]) -> str:
    """A rung's description for the terminal."""
    num = len({each.choice for each in left})
    goes_on = f"; the best {rung.keep} of {num} recipes go{'es' if rung.keep == 1 else ''} on" if rung.part < 1 else ""
    length = f"{rung.part} of the length" if rung.part < 1 else "full length"
    return f"\nrung    {plural(len(left), 'whole run')} at {length}{goes_on}"


def show(members: Sequence[Member], halving: int | None, terminal: Terminal) -> Path:
    """Print the table and the verdict, write the page. Returns the page's path. Raises UserError."""
    rungs: list[tuple[Rung | None, Standing]] = [(rung, read(runs)) for rung, runs in climbed(members, halving)]
    standing = rungs[-1][1]
    chosen_among = next((each for _, each in reversed(rungs) if len(each.ranked) > 1), standing)
    headline, luck = verdict(standing, chosen_among)
    out = members[0].path.parent / "sweep.html"
    sweep_page.write(out, rungs, headline, luck)
    terminal.print()
    for line in table(standing, terminal.width):
        terminal.print(line, markup=False)
    terminal.print(f"\n{escape.line(headline)}", style="bold", markup=False)
    terminal.print(escape.line(luck), markup=False)
    terminal.print(escape.line(f"page    {out}"), markup=False)
    return out
