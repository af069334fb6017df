"""Builds the `accelerate launch` command, for a workstation and for each node of a cluster."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tltrain
from tltrain.core import files
from tltrain.core.errors import UserError

ANSWER_S = 60.0
"""Longest wait for nvidia-smi, seconds."""
GRACE_S = 120  # seconds that torch's elastic agent waits for a save before SIGKILL; a Slurm job sets its own


@dataclass(frozen=True)
class World:
    """The processes of a run: their number, their device type and their rendezvous address."""

    num_nodes: int
    per_node: int
    gpus: bool
    threads: int
    """CPU threads of each process (OMP_NUM_THREADS)."""
    main_node: str = "127.0.0.1"
    port: int = 0
    """Port of the rendezvous. 0 picks a free one, which works on a single node only."""

    @property
    def num_processes(self) -> int:
        return self.num_nodes * self.per_node


def config_file(accelerate: str | None, world: World) -> Path:
    """Path of the accelerate configuration file.

    accelerate: the name of a shipped one, or a path. None picks the one for this world: cpu, one_gpu or ddp.
    Raises UserError where there is no such file.
    """
    folder = tltrain.share() / "accelerate_configs"
    if not accelerate:
        accelerate = "cpu" if not world.gpus else ("one_gpu" if world.num_processes == 1 else "ddp")
    path = Path(accelerate) if accelerate.endswith((".yaml", ".yml")) or "/" in accelerate else folder / f"{accelerate}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise UserError(f"--accelerate is {accelerate}; there are {names}, or the path of a configuration file of accelerate")
    return path


def arguments(config: Path, world: World, rank: int, argv: Sequence[str]) -> list[str]:
    """The `accelerate launch` command for the node of that rank.

    argv: the arguments of `tltrain`. On the CPU, --multi_gpu is needed too: without it accelerate starts independent processes.
    """
    together = ["--multi_gpu"] if world.num_processes > 1 and not world.gpus else []
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config), *together,
        "--num_machines", str(world.num_nodes), "--machine_rank", str(rank), "--num_processes", str(world.num_processes),
        "--main_process_ip", world.main_node, "--main_process_port", str(world.port),
        "--num_cpu_threads_per_process", str(world.threads), "-m", "launcher.worker", *argv,
    ]  # fmt: skip


def environment(world: World, notes: Path, grace_s: int = GRACE_S) -> dict[str, str]:
    """Environment variables to add for the processes. `notes` is the folder of failure notes, `grace_s` the longest save in seconds."""
    own = {
        "PYTHONUNBUFFERED": "1",  # a killed process must not lose the end of its log
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace_s),
        "TLTRAIN_NOTES": str(notes),
    }
    if not world.gpus:
        own["ACCELERATE_USE_CPU"] = "true"
    return own


def explain(code: int, notes: Path) -> str:
    """Explain an exit code of `accelerate launch`, which is 1 for every failure.

    A process that is killed leaves no failure note in `notes`. So where this host has none, the cause is probably a kill from outside.
    """
    host = socket.gethostname()
    failures = [json.loads(files.read_bytes(path)) for path in notes.glob("rank-*.failed.json")]
    silent = not any(failure["host"] == host for failure in failures)
    killed = " and left no note of a failure: killed from outside, as when memory is short?"
    return f"processes ended with code {code}" + (killed if silent else "")


def local_gpus() -> int:
    """Number of GPUs visible to a process on this machine, counted without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() not in ("", "-1")])
    return sum(line.startswith("GPU ") for line in nvidia_smi("--list-gpus").splitlines())


def nvidia_smi(*options: str) -> str:
    """The output of nvidia-smi; "" where it is missing or fails. Raises UserError where it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, check=False, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"nvidia-smi has not answered for {ANSWER_S:.0f} s: the driver or a GPU hangs (`dmesg`); restart it, or use the CPU by "
            "CUDA_VISIBLE_DEVICES="
        ) from None
    return done.stdout if done.returncode == 0 else ""
