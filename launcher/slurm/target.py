"""`tltrain launch slurm`: checks every command, then submits a job, a job array or a chain of jobs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from launcher import accelerate, jobs, shell
from launcher.accelerate import World
from launcher.command import FinishedRun, Training, check_processes, read, read_array, split
from launcher.slurm import client, script, site
from launcher.slurm.job import Job, sbatch_arguments
from launcher.target import Target
from tltrain.core.arguments import short_help
from tltrain.core.errors import UserError
from tltrain.core.flags import parse_flags
from tltrain.runs import run_dir

USAGE = """\
[--nodes N] [--time 4:00:00] -- train RECIPE …
… -- train TEACHER … -- train STUDENT …                  each starts when the one before is finished"""


@dataclass(frozen=True)
class SlurmFlags:
    """Options of `tltrain launch slurm`."""

    job: Annotated[Job, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print exactly what would be submitted, and submit nothing."""


@dataclass(frozen=True)
class Submission:
    """A job ready to be submitted: the folder for its record, its sbatch options, its script and its runs."""

    folder: Path
    arguments: list[str]
    script: str
    runs: tuple[Training, ...]


def main(argv: Sequence[str]) -> int:
    """Check everything, then submit one job, or a chain of jobs, and print their ids."""
    own, trainings = split(argv)
    if {"-h", "--help"} & set(own):
        _help()
        sys.exit(0)
    parsed = parse_flags(SlurmFlags(site.defaults()), own, "tltrain launch slurm")
    command = ["tltrain", "launch", "slurm", *argv]
    if parsed.job.array and len(trainings) > 1:
        raise UserError("--array and a chain of commands cannot be had at once; submit the array first, and the rest with --dependency")
    if parsed.job.dependency and len(trainings) > 1:
        raise UserError("--dependency and a chain of commands cannot be had at once; submit each by itself")
    try:
        prepared = [prepare(parsed.job, part, command) for part in trainings]
    except FinishedRun as error:
        if len(trainings) == 1:
            raise
        raise UserError(f"{error}. Leave it out of the chain") from None
    if parsed.dry_run:
        show(prepared)
        return 0
    client.require()
    for each in prepared:
        client.check(each.arguments, each.script)
    before = None
    for part, each in zip(trainings, prepared, strict=True):
        job = parsed.job if before is None else replace(parsed.job, dependency=f"afterok:{before}")
        before = submit(job, each if before is None else prepare(job, part, command), command)
    return 0


def _help() -> None:
    """Print the options on one screen, with the site's values."""
    print(f"usage: tltrain launch slurm [options] -- train RECIPE ...\n\n{main.__doc__}\nSite defaults: {site.path()}\n")
    short_help.print_fields(Job, site.defaults())
    print("  --dry-run             Print what would be submitted, and submit nothing")


def prepare(job: Job, argv: Sequence[str], command: Sequence[str]) -> Submission:
    """Validate a training command and render its job script. Writes no files. Raises FinishedRun and UserError."""
    if job.array:
        return prepare_runs(job, *read_array(argv, job.array_key, job.array_values), command)
    run = read(argv)
    return prepare_runs(job, run.run, [run], command)


def prepare_runs(job: Job, parent: Path, runs: Sequence[Training], command: Sequence[str]) -> Submission:
    """Render the job script of one run, or of an array of runs in `parent`. Writes no files. Raises UserError."""
    for run in runs:
        check_processes(run, job.nodes * job.processes_here)
    job_argv = script.argv_of_array(parent, runs) if job.array else script.argv_of(runs[0])
    accelerate.config_file(job.accelerate, World(job.nodes, job.processes_here, job.gpus_per_node > 0, threads=1))
    arguments = sbatch_arguments(job, _job_name(runs[0].recipe.name), script.log_pattern(parent, job.array is not None))
    text = script.render(job, arguments, job_argv, sys.executable if not job.container else "python", command)
    script.check_bash(text, job)
    return Submission(parent, arguments, text, tuple(runs))


def show(prepared: Sequence[Submission]) -> None:
    """Print each script under Slurm's verdict on it, or a note that no Slurm could be asked. Raises UserError if Slurm rejects one."""
    notes = [client.would_take(each.arguments, each.script) for each in prepared]
    for number, (each, note) in enumerate(zip(prepared, notes, strict=True)):
        print(f"# {note}" + ("; it waits until the job above is finished" if number else ""))
        print(each.script, end="")


def submit(job: Job, each: Submission, command: Sequence[str]) -> str:
    """Submit a job, record it in its run folder, print where to watch it, and return its id. Raises UserError."""
    for run in each.runs:
        run_dir.create(run.run, run.recipe)
    place = each.folder / "jobs"
    place.mkdir(parents=True, exist_ok=True)
    waiting = place / f".{time.time_ns()}.sbatch"
    waiting.write_bytes(each.script.encode("utf-8", "surrogateescape"))
    try:
        number = client.submit(waiting)
    except UserError:
        waiting.unlink()
        raise
    waiting.rename(place / f"{number}.sbatch")
    jobs.keep(each.folder, "slurm", number, each.runs, command=list(command), settings=asdict(job))
    print(f"job {number} submitted, run folder {each.folder}" + (f", waits for {job.dependency}" if job.dependency else ""))
    print(f"  watch   tail -F {shell.quote(str(place))}/{number}{'_*' if job.array else ''}.log")
    print(f"  look    tltrain launch status {shell.quote(str(each.folder))}")
    return number


def _job_name(recipe: str) -> str:
    """The recipe's name as a job name: characters that Slurm does not accept become `-`."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_.@+=-") else "-" for c in recipe).lstrip("_.@+=-")
    return name or "tltrain"


TARGET = Target(USAGE, main, client.state, client.cancel)
