"""The run folder: paths of its files, ownership by one start at a time, and the outcome. Only this module knows the file names.

Every start claims a generation by creating a file such as ``generations/000007`` exclusively. Its logs and checkpoints carry that
number, so a late write of an older process does no harm.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from tltrain import __version__
from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.paths import check_run
from tltrain.core.recipe import Recipe, parse
from tltrain.core.stage_plan import RACE, as_kept
from tltrain.runs import heartbeat, manifest
from tltrain.runs.links import check_links

OUT_OF_MEMORY = "out of memory"
"""The `signal` in the outcome of a start that ran out of memory. The next start continues with smaller batches."""
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "scikit-learn", "numpy", "pillow", "timm")


def recipe_file(run: Path) -> Path:
    return run / "recipe.yaml"


def weights_file(run: Path) -> Path:
    """The result of the run: the final weights of its last stage. For a stopped run: the best weights so far."""
    return run / "weights.safetensors"


def stage_weights_file(run: Path, stage: str) -> Path:
    """The final weights of one stage. stage: StagePlan.name."""
    return run / "stages" / stage / "weights.safetensors"


def metrics_file(run: Path, generation: int) -> Path:
    """The rows logged by one start."""
    return run / f"metrics-{generation:06d}.jsonl"


def metrics_files(run: Path) -> list[Path]:
    """The rows of all starts, oldest first."""
    return sorted(run.glob("metrics-*.jsonl"))


def predictions_file(run: Path) -> Path:
    return run / "test_predictions.csv"


def preview_file(run: Path) -> Path:
    return run / "preview.png"


def report_file(run: Path) -> Path:
    return run / "report.html"


def checkpoints(run: Path) -> Path:
    return run / "checkpoints"


def generations(run: Path) -> Path:
    """The folder of generation files and heartbeats."""
    return run / "generations"


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run. Raises UserError if the folder is not a run folder, or if the recipe is damaged."""
    file = recipe_file(run)
    check_run(run)
    manifest.check(file)
    try:
        return parse(files.read_text(file), str(file), kept=True)
    except ValueError as error:
        raise UserError(f"{error}\n{file} belongs to a run and may be damaged; copy it from a backup, or begin a new run") from error


def finished_weights(run: Path) -> Path:
    """The path `weights_file`, if it exists. Raises UserError otherwise."""
    file = weights_file(run)
    if not file.is_file():
        raise UserError(f"{run} has no {file.name} yet; let `tltrain train` finish it first")
    return file


def test_metrics(run: Path) -> dict[str, Any] | None:
    """The test metrics. None before the test. Raises UserError for a damaged file, as the next three functions do."""
    return manifest.read_json(run / "test_metrics.json", dict, ("n", "loss"))


def mistakes(run: Path) -> list[dict[str, Any]]:
    """The most confident mistakes on the test split. Empty before the test."""
    return manifest.read_json(run / "mistakes.json", list) or []


def right_answers(run: Path) -> list[dict[str, Any]]:
    """Right answers on the test split, the surest of each class. Empty before the test, and for runs of tltrain 0.1."""
    return manifest.read_json(run / "right_answers.json", list) or []


def environment(run: Path) -> dict[str, Any]:
    """The contents of env.json. Empty before the first start."""
    return manifest.read_json(run / "env.json", dict) or {}


def outcome(run: Path) -> dict[str, Any]:
    """The contents of outcome.json. Empty until a start has ended."""
    return manifest.read_json(run / "outcome.json", dict) or {}


def plan(run: Path) -> str:
    """The printed plan of the run. Empty before the first start."""
    file = run / "plan.txt"
    manifest.check(file)
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def write_plan(run: Path, text: str) -> None:
    files.write_atomic(run / "plan.txt", text)


def write_test(run: Path, figures: dict[str, Any], predictions: bytes, wrong: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    """Write the test results. predictions: CSV. The metrics are written last: if that file exists, the others do too."""
    files.write_atomic(predictions_file(run), predictions)
    files.write_json(run / "mistakes.json", wrong)
    files.write_json(run / "right_answers.json", right)
    files.write_json(run / "test_metrics.json", figures)


def _written_by_a_start(run: Path) -> list[Path]:
    """Files that each start overwrites."""
    names = ("env.json", "plan.txt", "mistakes.json", "right_answers.json", "test_metrics.json")
    return [weights_file(run), predictions_file(run), *(run / name for name in names)]


def seal(run: Path) -> None:
    """Save the checksums of the files of a start (see `manifest`). outcome.json is left out, since any process may write it later."""
    manifest.cover(run, [*_written_by_a_start(run), recipe_file(run), preview_file(run), *metrics_files(run)], anew=False)


def check_recipe(run: Path, recipe: Recipe) -> None:
    """Check that the folder is empty or holds a run of this recipe. Raises UserError with the differences."""
    check_links(run)
    if not recipe_file(run).exists():
        # A start that was killed before its recipe was complete leaves a temporary file of it, and nothing else.
        if run.is_dir() and not all(files.is_temporary(path, recipe_file(run)) for path in run.iterdir()):
            raise UserError(f"{run} holds files and is no run folder (it has no recipe.yaml); choose another with --folder")
        return
    if differences := (kept := read_recipe(run)).differences(as_kept(recipe, kept, manifest.read_json(run / RACE, dict) or {})):
        lines = "\n  ".join(differences)
        remedy = "choose another folder with --folder, or delete it"
        raise UserError(f"{run} holds a run of another recipe (its own -> yours):\n  {lines}\n{remedy}")


def create(run: Path, recipe: Recipe) -> None:
    """Create the run folder, its subfolders and its recipe, as far as they do not exist. Raises UserError."""
    check_links(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        if not recipe_file(run).exists():  # first of all: the recipe makes it a run folder
            files.write_atomic(recipe_file(run), recipe.to_yaml())
        for folder in (checkpoints(run), run / "stages", generations(run)):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {run} cannot be written: {error}; choose another with --folder") from error


def check_owner(run: Path, take_over: bool, stale_s: float) -> None:
    """Check that no earlier start of the run is still alive. Raises UserError with the owner of the run.

    A start has ended if it wrote an outcome, if its process on this machine is gone, or if its last heartbeat is older than `stale_s`
    seconds. A requeued Slurm job takes over from its earlier attempt at once.
    """
    signed = generations(run)
    newest = heartbeat.newest_generation(signed)
    ended = newest == 0 or outcome(run).get("generation") == newest or heartbeat.failed_file(signed, newest).exists()
    if ended or take_over:
        return
    try:
        owner = json.loads(files.read_bytes(signed / f"{newest:06d}"))
    except (OSError, ValueError):
        owner = {"host": "?", "pid": 0, "job": None, "restart": 0, "time": 0.0}  # it was killed while writing the file
    job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job is not None and owner["job"] == job and owner["restart"] < restart:
        return
    if owner["host"] == socket.gethostname() and not _is_alive(owner["pid"]):
        return
    beat = heartbeat.read_beat(signed, newest, 0)
    age_s = time.time() - float((beat or owner)["time"])
    if age_s > stale_s:
        return
    who = f"process {owner['pid']} on {owner['host']}" + (f" (Slurm job {owner['job']})" if owner["job"] else "")
    raise UserError(
        f"{run} is in use by {who}, which gave a sign of life {_ago(age_s)}; wait for it, stop it, choose another folder with "
        "--folder, or take the run over with --take-over"
    )


def _ago(age_s: float) -> str:
    return f"{age_s:.0f} s ago" if age_s > -1 else f"by a clock that is {-age_s:.0f} s ahead of this machine's (its age is not known)"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def claim(run: Path) -> int:
    """Claim the next generation exclusively. Two starts at the same moment get different numbers."""
    while True:
        generation = 1 + heartbeat.newest_generation(generations(run))
        try:
            handle = os.open(generations(run) / f"{generation:06d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            continue  # another start claimed this number first
        with os.fdopen(handle, "w") as file:
            restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
            json.dump({**owner, "job": os.environ.get("SLURM_JOB_ID"), "restart": restart}, file)
        return generation


def write_environment(run: Path, accelerate: dict[str, Any], device: str, kept: dict[str, Any], data: dict[str, Any]) -> None:
    """Write env.json: versions, hardware, git revision, distributed setup, command, data, and the start-up flags a resumed run keeps."""
    manifest.uncover(run, _written_by_a_start(run))
    packages = {name: found.version for name in PACKAGES for found in [*distributions(name=name)][:1]}
    known = {
        "versions": {"tltrain": __version__, "python": platform.python_version(), **packages},
        "hardware": {"machine": platform.machine(), "system": platform.platform(), "cpu_cores": os.cpu_count(), "device": device},
        "git": _git_revision(),
        "accelerate": accelerate,
        "command": sys.argv,
        "data": data,
        "kept": kept,
    }
    files.write_json(run / "env.json", known)


def kept(run: Path) -> dict[str, Any]:
    """The start-up flags saved by an earlier start of this run."""
    return dict(environment(run).get("kept", {}))


def keep(run: Path, flags: dict[str, Any]) -> None:
    """Change the saved start-up flags."""
    known = environment(run)
    manifest.uncover(run, [run / "env.json"])
    files.write_json(run / "env.json", {**known, "kept": {**known["kept"], **flags}})


def write_outcome(run: Path, generation: int, details: dict[str, Any]) -> None:
    """Write outcome.json: finished, stopped or failed, and where. Scripts read this file, since launchers exit with 1 for any failure.

    A start that was taken over writes nothing. The file belongs to the newer start.
    """
    if heartbeat.newest_generation(generations(run)) <= generation:
        files.write_json(run / "outcome.json", {**details, "generation": generation})


def write_failure(run: Path, generation: int, details: dict[str, Any]) -> dict[str, Any]:
    """Record the outcome of a failed start, unless another process recorded one first. Later failures are consequences of the first.

    Returns the details of the first.
    """
    if files.write_json_once(heartbeat.failed_file(generations(run), generation), details):
        write_outcome(run, generation, details)
        return details
    return failure(run, generation)


def failure(run: Path, generation: int) -> dict[str, Any]:
    """The details of the first failure in a start. Empty if there was none."""
    path = heartbeat.failed_file(generations(run), generation)
    return dict(json.loads(files.read_bytes(path))) if path.exists() else {}


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # an installed wheel, or git is missing: the version is recorded anyway
