"""The words of `tltrain launch`: local, slurm, status, cancel."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import tyro

from launcher import local, processes, quoting, script, site, slurm
from launcher.job import Job, sbatch_arguments
from launcher.processes import World
from launcher.words import Training, read, read_array, split
from tltrain import folder
from tltrain.errors import UserError

USAGE = """\
usage: tltrain launch local [--accelerate NAME] [--processes N] -- train RECIPE …     on this machine: all GPUs, or the CPU
       tltrain launch slurm [--nodes N] [--gpus-per-node N] [--time H:MM:SS] [--dry-run] -- train RECIPE …
       tltrain launch slurm … -- train TEACHER … -- train STUDENT …                  each starts when the one before is finished
       tltrain launch status RUN                                                     a run folder's jobs
       tltrain launch cancel RUN                                                     save, and stop the run's job
`tltrain launch slurm --help` lists all options. Site defaults stand in {site}.
"""


def main(words: Sequence[str]) -> int:
    """Run one of the launcher's verbs. Returns the exit code. Raises UserError."""
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(USAGE.format(site=site.path()))
        return 0
    verb, rest = words[0], list(words[1:])
    if verb == "local":
        return local.main(rest)
    if verb == "slurm":
        return launch_slurm(rest)
    if verb in ("status", "cancel"):
        return look_at(verb, rest)
    near = get_close_matches(verb, ("local", "slurm", "status", "cancel"), n=1)
    raise UserError(f"launch knows no {verb!r}; " + (f"did you mean {near[0]}?" if near else "there are local, slurm, status and cancel"))


@dataclass(frozen=True)
class _Words:
    job: Annotated[Job, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print exactly what would be submitted, and submit nothing."""


@dataclass(frozen=True)
class Submission:
    """A job ready to be submitted: where it is kept, its script, and its runs."""

    folder: Path
    arguments: list[str]
    script: str
    runs: tuple[Training, ...]


def launch_slurm(words: Sequence[str]) -> int:
    """Check everything, then submit one job, or a chain of jobs, and print their ids."""
    own, trainings = split(words)
    parsed = tyro.cli(_Words, default=_Words(site.defaults()), args=own, prog="tltrain launch slurm", description=launch_slurm.__doc__)
    command = ["tltrain", "launch", "slurm", *words]
    if parsed.job.array and len(trainings) > 1:
        raise UserError("--array and a chain of commands cannot be had at once; submit the array first, and the rest with --dependency")
    if parsed.job.dependency and len(trainings) > 1:
        raise UserError("--dependency and a chain of commands cannot be had at once; submit each by itself")
    prepared = [prepare(parsed.job, part, command) for part in trainings]
    slurm.require()
    notes = [slurm.check(each.arguments, each.script) for each in prepared]
    if parsed.dry_run:
        for number, (each, note) in enumerate(zip(prepared, notes, strict=True)):
            print(f"# {note}" + ("; it waits until the job above is finished" if number else ""))
            print(each.script, end="")
        return 0
    before = None
    for part, each in zip(trainings, prepared, strict=True):
        job = parsed.job if before is None else replace(parsed.job, dependency=f"afterok:{before}")
        before = submit(job, each if before is None else prepare(job, part, command), command)
    return 0


def prepare(job: Job, words: Sequence[str], command: Sequence[str]) -> Submission:
    """Validate a command's recipe and overrides and render its script; touches nothing. Raises UserError."""
    if job.array:
        parent, trainings = read_array(words, job.array_key, job.array_values)
        runs, given = tuple(trainings), script.words_of_array(parent, trainings)
    else:
        runs = (read(words),)
        parent, given = runs[0].run, script.words_of(runs[0])
    processes.config_file(job.accelerate, World(job.nodes, job.processes_here, job.gpus_per_node > 0, threads=1))
    arguments = sbatch_arguments(job, _job_name(runs[0].recipe.name), script.log_pattern(parent, job.array is not None))
    text = script.render(job, arguments, given, sys.executable if not job.container else "python", command)
    script.check_bash(text, job)
    return Submission(parent, arguments, text, runs)


def submit(job: Job, each: Submission, command: Sequence[str]) -> str:
    """Keep a job in its run folder, submit it, say so, and return its id."""
    for run in each.runs:
        folder.create(run.run, run.recipe)
    jobs = each.folder / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    waiting = jobs / f".{time.time_ns()}.sbatch"
    waiting.write_bytes(each.script.encode("utf-8", "surrogateescape"))
    try:
        number = slurm.submit(waiting)
    except UserError:
        waiting.unlink()
        raise
    values = {"time": time.time(), "command": list(command), "settings": asdict(job), "runs": [str(run.run) for run in each.runs]}
    slurm.store(each.folder, number, waiting, values)
    print(f"job {number} submitted, run folder {each.folder}" + (f", waits for {job.dependency}" if job.dependency else ""))
    print(f"  watch   tail -F {quoting.quote(str(jobs))}/{number}{'_*' if job.array else ''}.log")
    print(f"  look    tltrain launch status {quoting.quote(str(each.folder))}")
    return number


def look_at(verb: str, words: Sequence[str]) -> int:
    """Print, or cancel, the jobs of a run folder."""
    parser = argparse.ArgumentParser(prog=f"tltrain launch {verb}", description=look_at.__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or the folder that holds an array's runs")
    path = parser.parse_args(words).run
    latest = slurm.stored(path)[-1]
    if verb == "cancel":
        slurm.cancel(latest.id)
        print(f"job {latest.id} is told to save and stop")
        return 0
    print(f"job {latest.id}: {slurm.state(latest.id)}")
    for run in map(Path, latest.values["runs"]):
        print(f"{run}: {_describe(folder.outcome(run))}")
    return 0


def _describe(outcome: dict[str, object]) -> str:
    if not outcome:
        return "no outcome yet"
    details = ", ".join(f"{key} {outcome[key]}" for key in ("signal", "stage", "step", "rank", "error") if outcome.get(key) is not None)
    return f"{outcome['outcome']}" + (f" ({details})" if details else "")


def _job_name(recipe: str) -> str:
    """The recipe's name with what a queue's column cannot show replaced."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "_.@+=-") else "-" for c in recipe).lstrip("_.@+=-")
    return kept or "tltrain"
