"""Submits many runs as one job array, whatever their recipes differ in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.command import Training
from launcher.slurm import client, site
from launcher.slurm.target import SlurmFlags, prepare_runs, show, submit
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags, parse_flags
from tltrain.core.recipe import Recipe
from tltrain.runs.folds import folder
from tltrain.runs.folds.folder import FoldsFolder
from tltrain.runs.report.formatting import finished_of


def submit_array(parent: Path, runs: Sequence[Training], own: Sequence[str], command: Sequence[str]) -> int:
    """Submit one job array of a job for each run, or show it where `own` has --dry-run. Returns the exit code. Raises UserError.

    parent: the folder in which the folders of all runs stand. own: options of `tltrain launch slurm`. command: what the user typed.
    """
    parsed = parse_flags(SlurmFlags(site.defaults()), own, "tltrain launch slurm")
    if parsed.job.array is not None:
        raise UserError(f"--array is {parsed.job.array}, and the runs of {parent.name} are an array already; leave it out")
    job = replace(parsed.job, array="run=" + ",".join(run.run.name for run in runs))
    prepared = prepare_runs(job, parent, runs, command)
    if parsed.dry_run:
        show([prepared])
        return 0
    client.require()
    client.check(prepared.arguments, prepared.script)
    submit(job, prepared, command)
    return 0


def submit_folds(wanted: FoldsFolder, parsed: Sequence[tuple[Recipe, RunFlags]], own: Sequence[str], command: Sequence[str]) -> int:
    """Submit the runs of a cross-validation that are not finished. parsed: one for each of `wanted.members`. Raises UserError."""
    wanted = replace(wanted, path=wanted.path.absolute())
    folder.check(wanted, [recipe for recipe, _ in parsed])
    runs = [Training(recipe, start, start.folder) for recipe, start in folder.unfinished(wanted, parsed) if start.folder is not None]
    if not runs:
        print(f"{finished_of(len(parsed), len(parsed))}: `tltrain report {wanted.path}` writes the page")
        return 0
    if "--dry-run" not in own:
        folder.create(wanted)
    code = submit_array(wanted.path, runs, own, command)
    print(f"when they are finished, `tltrain report {wanted.path}` puts them together")
    return code
