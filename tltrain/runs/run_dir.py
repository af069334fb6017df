"""A run folder: who writes in it, what stands in it, and how the last start ended.

Every start claims a generation by creating ``generations/000007`` exclusively, and writes only under names that carry it:
a late write of an old process is then harmless.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tltrain import __version__
from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe, parse
from tltrain.runs import heartbeat

OUT_OF_MEMORY = "out of memory"
"""In place of a signal, where a start has stopped to go on with less at a time."""
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "scikit-learn", "numpy", "pillow")


def check_recipe(run: Path, recipe: Recipe) -> None:
    """Refuse a folder that holds a run of another recipe. Raises UserError with the differences."""
    path = run / "recipe.yaml"
    if not path.exists():
        if run.is_dir() and any(run.iterdir()):
            raise UserError(f"{run} holds files and is no run folder (it has no recipe.yaml); choose another with --folder")
        return
    differences = parse(path.read_text(encoding="utf-8"), str(path), kept=True).differences(recipe)
    if differences:
        lines = "\n  ".join(differences)
        remedy = "choose another folder with --folder, or delete it"
        raise UserError(f"{run} holds a run of another recipe (its own -> yours):\n  {lines}\n{remedy}")


def create(run: Path, recipe: Recipe) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoints", "stages", "generations"):
            (run / name).mkdir(exist_ok=True)
        if not (run / "recipe.yaml").exists():
            files.write_atomic(run / "recipe.yaml", recipe.to_yaml())
    except OSError as error:
        raise UserError(f"the run folder {run} cannot be written: {error}; choose another with --folder") from error


def check_owner(run: Path, take_over: bool, stale_s: float) -> None:
    """Refuse to start beside a start that still lives. Raises UserError with who owns the run.

    It has ended if it said so, if its process is gone from this machine, or if its last sign of life is older than `stale_s`
    seconds. The same Slurm job, requeued, takes over from its earlier self at once.
    """
    generations = run / "generations"
    newest = heartbeat.newest_generation(generations)
    ended = newest == 0 or outcome(run).get("generation") == newest or heartbeat.failed_file(generations, newest).exists()
    if ended or take_over:
        return
    try:
        owner = json.loads((generations / f"{newest:06d}").read_text())
    except ValueError:
        owner = {"host": "?", "pid": 0, "job": None, "restart": 0, "time": 0.0}  # it died while it signed
    job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job is not None and owner["job"] == job and owner["restart"] < restart:
        return
    if owner["host"] == socket.gethostname() and not _is_alive(owner["pid"]):
        return
    beat = heartbeat.read_beat(generations, newest, 0)
    age_s = time.time() - (beat or owner)["time"]
    if age_s > stale_s:
        return
    who = f"process {owner['pid']} on {owner['host']}" + (f" (Slurm job {owner['job']})" if owner["job"] else "")
    raise UserError(
        f"{run} is in use by {who}, which gave a sign of life {age_s:.0f} s ago; wait for it, stop it, choose another folder with "
        "--folder, or take the run over with --take-over"
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def claim(run: Path) -> int:
    """The next generation, taken exclusively: of two starts at the same moment each gets its own number."""
    while True:
        generation = 1 + heartbeat.newest_generation(run / "generations")
        try:
            handle = os.open(run / "generations" / f"{generation:06d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            continue  # somebody was quicker
        with os.fdopen(handle, "w") as file:
            restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
            json.dump({**owner, "job": os.environ.get("SLURM_JOB_ID"), "restart": restart}, file)
        return generation


def write_environment(run: Path, accelerate: dict[str, Any], device: str, kept: dict[str, Any], data: dict[str, Any]) -> None:
    """env.json: versions, hardware, git revision, how the run is spread, the command, which data, and the start-up flags a resumed run
    keeps."""
    hardware = {"machine": platform.machine(), "system": platform.platform(), "cpu_cores": os.cpu_count(), "device": device}
    environment = {
        "versions": {"tltrain": __version__, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": hardware,
        "git": _git_revision(),
        "accelerate": accelerate,
        "command": sys.argv,
        "data": data,
        "kept": kept,
    }
    files.write_json(run / "env.json", environment)


def kept(run: Path) -> dict[str, Any]:
    """The start-up flags that an earlier start of this run wrote down."""
    path = run / "env.json"
    return dict(json.loads(path.read_text()).get("kept", {})) if path.exists() else {}


def keep(run: Path, flags: dict[str, Any]) -> None:
    """Change start-up flags that a resumed run keeps."""
    environment = json.loads((run / "env.json").read_text())
    files.write_json(run / "env.json", {**environment, "kept": {**environment["kept"], **flags}})


def write_outcome(run: Path, generation: int, details: dict[str, Any]) -> None:
    """outcome.json: finished, stopped or failed, and where. Scripts decide by this file, since launchers return 1 for everything.

    A start that was taken over keeps silent: the file is the newer one's.
    """
    if heartbeat.newest_generation(run / "generations") <= generation:
        files.write_json(run / "outcome.json", {**details, "generation": generation})


def write_failure(run: Path, generation: int, details: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a start that failed, by whichever process failed first: what the others report is only a consequence.

    Returns the details of the first.
    """
    if files.write_json_once(heartbeat.failed_file(run / "generations", generation), details):
        write_outcome(run, generation, details)
        return details
    return failure(run, generation)


def failure(run: Path, generation: int) -> dict[str, Any]:
    """What the process said that failed first in a start; empty where none has."""
    path = heartbeat.failed_file(run / "generations", generation)
    return dict(json.loads(path.read_text())) if path.exists() else {}


def outcome(run: Path) -> dict[str, Any]:
    path = run / "outcome.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # an installed wheel, or no git: the version says enough
