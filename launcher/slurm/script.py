"""Renders the job script: the template slurm/train.sbatch with this job's header and settings. `sbatch SCRIPT` repeats the job."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import tltrain
from launcher import shell
from launcher.command import Training, flags
from launcher.slurm.job import Job, header, settings
from tltrain.core.errors import UserError

LOG_PATH = re.compile(r"[^\x00-\x1f\x7f%\\\"'#]+")


def render(job: Job, arguments: list[str], argv: list[str], python: str, command: Sequence[str]) -> str:
    """Render the job script.

    arguments: options for sbatch, which become #SBATCH lines.
    argv: the training command, quoted for bash.
    command: the user's command line, kept as a comment.
    """
    template = _template()
    before = template[template.index("set -e\n") : template.index("# Settings: ")]
    after = template[template.index("# -----") :]
    comment = f"# {shell.join(command)}\n# Written by `tltrain launch slurm`; `sbatch` of this file repeats the job.\n"
    return f"#!/usr/bin/env bash\n{comment}{header(arguments)}{before}{settings(job, python, argv)}{after}"


def argv_of(training: Training) -> list[str]:
    """The training command of a job with one run, quoted for bash."""
    return [shell.quote(word) for word in training.argv]


def argv_of_array(parent: Path, runs: Sequence[Training]) -> list[str]:
    """The training command shared by the jobs of an array, quoted for bash. The run folder ends in $value."""
    folder = shell.quote(str(parent)) + '/"$value"'
    shared = [shell.quote(word) for word in _without_folder(flags(runs[0].start))]
    return ["train", folder + "/recipe.yaml", *shared, "--folder", folder]


def log_pattern(folder: Path, array: bool) -> str:
    """Slurm's pattern for the path of the job's log. Raises UserError for a folder name with characters that Slurm interprets."""
    if LOG_PATH.fullmatch(str(folder)) is None or str(folder) != str(folder).strip():
        rule = "choose a name without control characters and % \\ \" ' #"
        raise UserError(f"the run folder is {str(folder)!r}; Slurm cannot write a log there: {rule}")
    return f"{folder}/jobs/{'%A_%a' if array else '%j'}.log"


def check_bash(text: str, job: Job) -> None:
    """Check the syntax of the script with `bash -n`. Raises UserError for invalid set-up lines."""
    for line in [*job.setup, text]:
        env = {**os.environ, "LC_ALL": "C"}  # no locale warnings: any output is about the script (an open here-document only warns)
        env.pop("BASH_ENV", None)  # bash would run that file, whatever it does
        done = subprocess.run(["bash", "-n"], input=line.encode("utf-8", "surrogateescape"), env=env, capture_output=True, check=False)
        problem = done.stderr.decode(errors="replace").strip()
        if done.returncode != 0 or problem:
            what = repr(line) if line in job.setup else "the script"
            raise UserError(f"--setup: bash does not understand {what}: {problem}")


def _without_folder(argv: list[str]) -> list[str]:
    at = argv.index("--folder")
    return argv[:at] + argv[at + 2 :]


def _template() -> str:
    return (tltrain.share() / "slurm" / "train.sbatch").read_text(encoding="utf-8")
