"""Command line of `tltrain launch`: starts a run on a target, or shows (status) or stops (cancel) the job of a run folder."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from launcher import jobs
from launcher.command import FinishedRun
from launcher.target import Target
from tltrain.core import registry
from tltrain.core.errors import Parser, UserError
from tltrain.core.output import escape
from tltrain.runs import run_dir

VERBS = {
    "status": "RUN                                                     a run folder's jobs",
    "cancel": "RUN                                                     save, and stop the run's job",
}


def main(argv: Sequence[str]) -> int:
    """Run `tltrain launch` with these arguments. Returns the exit code. Raises UserError."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    verb, rest = argv[0], list(argv[1:])
    if verb in VERBS:
        return look_at(verb, rest)
    known = (*registry.names("targets"), *VERBS)
    if verb not in known:
        near = get_close_matches(verb, known, n=1)
        raise UserError(f"launch knows no {verb!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"))
    target: Target = registry.find("targets", verb, f"launch knows {verb!r}")
    try:
        return target.main(rest)
    except FinishedRun as done:  # as in `tltrain train`: repeating a finished command must not fail a script
        print(escape.line(str(done)))
        return 0


def usage() -> str:
    """The help text: one line for each form of the command."""
    lines = []
    for name in registry.names("targets"):
        try:
            target: Target = registry.find("targets", name, f"launch knows {name!r}")
            lines += [f"{name} {line}" for line in target.usage.splitlines()]
        except UserError as error:  # a target of another package that cannot be imported must not hide the others
            lines.append(f"{name}: {error}")
    lines += [f"{verb} {line}" for verb, line in VERBS.items()]
    return "usage:\n" + "".join(map(_form, lines)) + "`tltrain launch NAME --help` lists all options.\n"


def _form(line: str) -> str:
    """A form of the command, and below it what stands behind three spaces or more: what it is for."""
    form, *about = re.split(r" {3,}", line, maxsplit=1)
    return f"  tltrain launch {form}\n" + "".join(f"      {text}\n" for text in about)


def look_at(verb: str, argv: Sequence[str]) -> int:
    """Print, or cancel, the jobs of a run folder."""
    parser = Parser(prog=f"tltrain launch {verb}", description=look_at.__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or the folder that holds an array's runs")
    path = parser.parse_args(argv).run
    job = jobs.latest(path)
    target: Target = registry.find("targets", job.target, f"job {job.id} of {path} was submitted to the target {job.target!r}")
    if verb == "cancel":
        target.cancel(job.id)
        print(f"job {job.id} is told to save and stop")
        return 0
    print(f"job {job.id}: {escape.line(target.state(job.id))}")
    for run in job.runs:
        print(escape.line(f"{run}: {_describe(run_dir.outcome(run))}"))
    return 0


def _describe(outcome: dict[str, object]) -> str:
    if not outcome:
        return "no outcome yet"
    details = ", ".join(f"{key} {outcome[key]}" for key in ("signal", "stage", "step", "rank", "error") if outcome.get(key) is not None)
    return f"{outcome['outcome']}" + (f" ({details})" if details else "")
