"""The script of a job: slurm/train.sbatch with this job's own header and settings. Pure functions; `sbatch SCRIPT` repeats the job."""

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


def render(job: Job, arguments: list[str], words: list[str], python: str, command: Sequence[str]) -> str:
    """The script. `arguments` become #SBATCH lines, `words` are bash words; `command` is what the user typed, kept as a comment."""
    template = _template()
    before = template[template.index("set -e\n") : template.index("# Settings: ")]
    after = template[template.index("# -----") :]
    kept = f"# {shell.join(command)}\n# Written by `tltrain launch slurm`; `sbatch` of this file repeats the job.\n"
    return f"#!/usr/bin/env bash\n{kept}{header(arguments)}{before}{settings(job, python, words)}{after}"


def words_of(training: Training) -> list[str]:
    """What a job of one run is given, as bash words."""
    return [shell.quote(word) for word in training.words]


def words_of_array(parent: Path, runs: Sequence[Training]) -> list[str]:
    """What each job of an array is given, as bash words: the run folder ends in $value."""
    folder = shell.quote(str(parent)) + '/"$value"'
    shared = [shell.quote(word) for word in _without_folder(flags(runs[0].start))]
    return ["train", folder + "/recipe.yaml", *shared, "--folder", folder]


def log_pattern(folder: Path, array: bool) -> str:
    """Slurm's pattern for the job's log. Raises UserError for a folder whose name Slurm would read as something else."""
    if LOG_PATH.fullmatch(str(folder)) is None or str(folder) != str(folder).strip():
        rule = "choose a name without control characters and % \\ \" ' #"
        raise UserError(f"the run folder is {str(folder)!r}; Slurm cannot write a log there: {rule}")
    return f"{folder}/jobs/{'%A_%a' if array else '%j'}.log"


def check_bash(text: str, job: Job) -> None:
    """Let bash read the script without running it. Raises UserError for set-up lines that are no bash."""
    for line in [*job.setup, text]:
        env = {**os.environ, "LC_ALL": "C"}  # whatever it says is then about the script: a here-document without an end is only warned of
        done = subprocess.run(["bash", "-n"], input=line.encode("utf-8", "surrogateescape"), env=env, capture_output=True, check=False)
        said = done.stderr.decode(errors="replace").strip()
        if done.returncode != 0 or said:
            what = repr(line) if line in job.setup else "the script"
            raise UserError(f"--setup: bash does not understand {what}: {said}")


def _without_folder(words: list[str]) -> list[str]:
    at = words.index("--folder")
    return words[:at] + words[at + 2 :]


def _template() -> str:
    return (tltrain.share() / "slurm" / "train.sbatch").read_text(encoding="utf-8")
