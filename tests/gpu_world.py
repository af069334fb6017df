"""Runs in processes of their own, as a launcher starts them on a GPU, or on the CPU: many at once, since each start takes seconds.

As a program this is one such process: `python tests/gpu_world.py DEVICE TRIAL`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a program it has only its own folder

from benchmarks import plants, world  # noqa: E402
from benchmarks.world import Trial  # noqa: E402

LIMIT_S = 150
"""What one run may take; the longest ones compile."""


class Worlds:
    """Runs that go on beside each other. A trial's strategy is alone (no launcher) or the name of a file in accelerate_configs/."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        self.runs: dict[str, Future[Path]] = {}

    def start(self, name: str, trial: Trial, precision: str = "no") -> None:
        self.runs[name] = self.pool.submit(_finish, trial, self.device, precision)

    def __getitem__(self, name: str) -> Path:
        """The folder of a run that has finished. Raises AssertionError with what its processes printed where it did not."""
        return self.runs[name].result()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def _finish(trial: Trial, device: str, precision: str) -> Path:
    own = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TLTRAIN_CACHE": f"{trial.folder}.cache"}
    own |= {"NVIDIA_TF32_OVERRIDE": "0", "ACCELERATE_MIXED_PRECISION": precision}
    own["TORCH_EXTENSIONS_DIR"] = f"{trial.folder}.operators" if device == "cuda" else str(Path(sys.prefix) / "torch_extensions")
    words = [str(Path(__file__).resolve()), device, json.dumps(asdict(trial))]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", "1"]
    launch += ["--config_file", f"{ROOT}/accelerate_configs/{trial.strategy}.yaml", "--mixed_precision", precision]
    port = _free_port()
    if trial.strategy == "alone":
        starts = [([sys.executable, *words], own)]
    elif device == "cuda" and trial.world == 1:
        starts = [([*launch, "--main_process_port", str(port), *words], own)]
    else:
        starts = [([sys.executable, *words], own | _place(rank, trial.world, port, device)) for rank in range(trial.world)]
    processes = []
    for rank, (command, changes) in enumerate(starts):
        with open(f"{trial.folder}.rank{rank}.log", "wb") as log:
            environment = {**os.environ, **changes}
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True))
    codes = [_wait(process) for process in processes]
    assert codes == [0] * len(codes), f"{trial.strategy} {trial.start} ended with {codes}\n{world.log(trial)}"
    return Path(trial.folder)


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Its exit code; None where it does not end."""
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _place(rank: int, num: int, port: int, device: str) -> dict[str, str]:
    """Where a process stands in its world. On a GPU each is the first of its machine: together they have the one device that is there."""
    local_rank, local_num = (0, 1) if device == "cuda" else (rank, num)
    own = {"RANK": rank, "WORLD_SIZE": num, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_num, "MASTER_PORT": port}
    return {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _run(device: str, trial: Trial) -> None:
    """What each process does."""
    if device == "cpu":
        world.force_strategy("ddp" if trial.strategy == "alone" else trial.strategy, trial.world)
    elif trial.world > 1:
        plants.say_gloo()  # NCCL takes no two processes on one device
    from tltrain.core.flags import RunFlags
    from tltrain.core.recipe import validate
    from tltrain.training.run import train

    if trial.float64:
        world.use_float64()
    if trial.strategy == "fsdp2":
        plants.count_units(f"{trial.folder}.units")
    start: dict[str, Any] = {"workers": 0, "folder": Path(trial.folder)} | trial.start
    assert train(validate(trial.recipe, "trial"), RunFlags(**start))["outcome"] == "finished"


if __name__ == "__main__":
    _run(sys.argv[1], Trial(**json.loads(sys.argv[2])))
