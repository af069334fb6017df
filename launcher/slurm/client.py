"""Runs Slurm's commands (sbatch, squeue, sacct, scancel) to check, submit, query and cancel jobs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tltrain.core.errors import MachineError, UserError

JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")
ANSWER_S = 120.0
"""Longest wait for a command of Slurm, seconds. Its own time-out for messages is 10 s, and it tries several times."""
# sbatch's error where Slurm is installed and no controller can be reached.
UNREACHABLE = re.compile(r"unable to contact slurm|could not establish a configuration source", re.IGNORECASE)


def require() -> None:
    """Check that sbatch is installed. Raises UserError where it is missing."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch was not found: this machine has no Slurm. Start here with `tltrain launch local`, or log in to the cluster")


def check(arguments: Sequence[str], script: str) -> str:
    """Validate a job with `sbatch --test-only`, which submits nothing. Returns Slurm's message. Raises UserError if Slurm rejects it."""
    options = [a for a in arguments if not a.startswith("--dependency=")]  # in a chain the job to wait for is not submitted yet
    done = _run(["sbatch", "--test-only", *options], stdin=script)
    if done.returncode != 0:
        raise UserError(f"Slurm refuses this job: {_message(done)}\nsbatch had {' '.join(options)}")
    return _message(done)


def would_take(arguments: Sequence[str], script: str) -> str:
    """Validate a job for a dry run. Returns Slurm's message, or the reason why it could not be checked. Raises UserError if rejected."""
    if shutil.which("sbatch") is None:
        return "not checked by Slurm: sbatch was not found on this machine"
    try:
        return check(arguments, script)
    except UserError as error:
        if UNREACHABLE.search(str(error)) is None:
            raise
        return "not checked by Slurm: no controller answers this machine"


def submit(script: Path) -> str:
    """Submit a script and return the job's id. Raises UserError."""
    done = _run(["sbatch", "--parsable", str(script)])
    if done.returncode != 0:
        raise UserError(f"Slurm did not take the job: {_message(done)}")
    output = done.stdout.split()  # a site's wrapper may print a greeting first
    number = output[-1].split(";")[0] if output else ""  # ID;CLUSTER where there are several clusters
    if JOB_ID.fullmatch(number) is None:
        raise UserError(f"sbatch took the job and printed no job number: {done.stdout.strip()!r}; `squeue --me` shows the job")
    return number


def state(job: str) -> str:
    """The state of a job, from squeue, sacct or Slurm's completion log, in that order. Raises UserError for an invalid id."""
    _check_id(job)
    done = _run(["squeue", "--noheader", "--job", job, "--states", "all", "--format", "%T|%r|%N"])
    lines = [line.split("|") for line in done.stdout.splitlines() if line.strip()]
    if lines:
        return ", ".join(
            what + (f" on {nodes}" if nodes else "") + (f" ({why})" if why not in ("None", "") else "") for what, why, nodes in lines
        )
    if shutil.which("sacct"):
        done = _run(["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job, "--format", "State"])
        if done.returncode == 0 and done.stdout.strip():
            return ", ".join(done.stdout.split("\n")).strip(", ")
    return _completion_log(job) or "unknown to Slurm (it forgets jobs after a while)"


def cancel(job: str) -> None:
    """Cancel a job. Raises UserError.

    The id comes from a file, so it is checked first: an "id" such as `--user=ME` would cancel every job of the user.
    """
    _check_id(job)
    done = _run(["scancel", job])
    if done.returncode != 0:
        raise UserError(f"job {job} could not be cancelled: {_message(done)}")


def _check_id(job: str) -> None:
    if JOB_ID.fullmatch(job) is None:
        raise UserError(f"the job is called {job!r}, and Slurm's jobs have numbers such as 123 or 123_4; look into the queue itself")


def _completion_log(job: str) -> str | None:
    config = dict(re.findall(r"^(\S+)\s*= (.*)$", _run(["scontrol", "show", "config"]).stdout, re.MULTILINE))
    if "filetxt" not in config.get("JobCompType", ""):
        return None
    try:
        lines = Path(config["JobCompLoc"].strip()).read_text(errors="replace").splitlines()
    except OSError:
        return None  # the file belongs to the controller and is often readable by administrators alone
    states = re.findall(rf"^JobId={job} .*?JobState=(\S+)", "\n".join(lines), re.MULTILINE)
    return str(states[-1]) if states else None


def _run(command: Sequence[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    text = None if stdin is None else stdin.encode("utf-8", "surrogateescape")
    try:
        done = subprocess.run(list(command), input=text, capture_output=True, check=False, timeout=ANSWER_S)
    except FileNotFoundError:
        raise UserError(f"{command[0]} was not found: this machine has no Slurm") from None
    except subprocess.TimeoutExpired:
        taken = "; look with `squeue --me` whether Slurm has the job all the same" if command[:2] == ["sbatch", "--parsable"] else ""
        raise MachineError(f"{command[0]} has not answered for {ANSWER_S:.0f} s: its controller is down or busy{taken}") from None
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    return subprocess.CompletedProcess(list(command), done.returncode, out, err)


def _message(done: subprocess.CompletedProcess[str]) -> str:
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or f"exit code {done.returncode}"
