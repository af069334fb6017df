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
from tltrain.core.errors import UserError

GRACE_S = 120  # longest save that the launcher's agent waits for before it kills; a job says its own


@dataclass(frozen=True)
class World:
    """The processes of a run and where they meet."""

    num_nodes: int
    per_node: int
    gpus: bool
    threads: int
    """Threads of each process for computing on the CPU."""
    main_node: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one, which only a single node can."""

    @property
    def num_processes(self) -> int:
        return self.num_nodes * self.per_node


def config_file(accelerate: str | None, world: World) -> Path:
    """The file of accelerate that says how the run is spread: by name, by path, or what suits the world. Raises UserError."""
    folder = tltrain.share() / "accelerate_configs"
    if not accelerate:
        accelerate = "cpu" if not world.gpus else ("one_gpu" if world.num_processes == 1 else "ddp")
    path = Path(accelerate) if accelerate.endswith((".yaml", ".yml")) or "/" in accelerate else folder / f"{accelerate}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise UserError(f"--accelerate is {accelerate}; there are {names}, or the path of a configuration file of accelerate")
    return path


def arguments(config: Path, world: World, rank: int, words: Sequence[str]) -> list[str]:
    """`accelerate launch` on the node of that rank. Processes on the CPU form one world only as --multi_gpu."""
    together = ["--multi_gpu"] if world.num_processes > 1 and not world.gpus else []
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config), *together,
        "--num_machines", str(world.num_nodes), "--machine_rank", str(rank), "--num_processes", str(world.num_processes),
        "--main_process_ip", world.main_node, "--main_process_port", str(world.port),
        "--num_cpu_threads_per_process", str(world.threads), "-m", "launcher.worker", *words,
    ]  # fmt: skip


def environment(world: World, notes: Path, grace_s: int = GRACE_S) -> dict[str, str]:
    """What the processes must find in their environment, beside what is there already."""
    own = {
        "PYTHONUNBUFFERED": "1",  # a log that stops in mid-sentence helps nobody
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace_s),
        "TLTRAIN_NOTES": str(notes),
    }
    if not world.gpus:
        own["ACCELERATE_USE_CPU"] = "true"
    return own


def explain(code: int, notes: Path) -> str:
    """What is known of processes that ended like this: accelerate launch says 1 for everything, and who is killed leaves no word."""
    host = socket.gethostname()
    words = [json.loads(path.read_text(encoding="utf-8")) for path in notes.glob("rank-*.failed.json")]
    silent = not any(word["host"] == host for word in words)
    return f"processes ended with code {code}" + (" without a word: killed from outside, as when memory is short?" if silent else "")


def local_gpus() -> int:
    """GPUs of this machine that a process may use, counted without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0
