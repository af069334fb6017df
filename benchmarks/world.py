"""Worlds of several CPU processes, forked from one server that has imported everything: a trial costs seconds, not imports.

Accelerate starts neither FSDP nor DeepSpeed on a CPU by itself; what makes it do so stands here, and only here.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "accelerate",
        "torch.distributed.tensor",
        "transformers.models.vit.modeling_vit",
        "tltrain.training.run",
        "tltrain.distributed.strategies",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # where it is installed: each of its runs asks for this one, and torch's compiler
    ]
)
DONE = {"finished": 0, "stopped": 75}


@dataclass(frozen=True)
class Trial:
    """One start of a run in a world."""

    recipe: dict[str, Any]
    folder: str
    world: int = 1
    strategy: str = "ddp"
    """ddp, fsdp2, zero2, zero3; ddp in a world of one is one plain process."""
    start: dict[str, Any] = field(default_factory=dict)
    float64: bool = False
    before: str | None = None
    """A function of plants.py beside this file, or faults.NAME or bugs.NAME, called in every process before the run: what a test spoils."""
    arguments: tuple[Any, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the processes, such as TLTRAIN_CACHE."""


def begin(trial: Trial) -> list[Any]:
    """Start a trial's processes."""
    if trial.strategy.startswith("zero"):
        build_operator()
    port = _free_port()
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):  # DeepSpeed settles on one as it is imported
        forkserver.ensure_running()
    processes = [CONTEXT.Process(target=_work, args=(trial, rank, port), daemon=False) for rank in range(trial.world)]
    for process in processes:
        process.start()
    return processes


def run(trial: Trial, timeout_s: float = 150.0) -> list[int]:
    """Exit codes of a trial's processes, by rank: 0 finished, 75 stopped, 1 failed, 2 refused, negative for a signal."""
    return join(trial, begin(trial), timeout_s)


def join(trial: Trial, processes: list[Any], timeout_s: float = 150.0) -> list[int]:
    """Wait for a trial's processes to end; their exit codes as in `run`."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [i for i, p in enumerate(processes) if p.exitcode is None]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    assert not late, f"ranks {late} did not end within {timeout_s} s: {log(trial)}"
    return [int(p.exitcode or 0) for p in processes]


def finish(trial: Trial) -> Path:
    """Run a trial to its end; the run folder."""
    codes = run(trial)
    assert codes == [0] * trial.world, f"{codes}\n{log(trial)}"
    return Path(trial.folder)


def log(trial: Trial) -> str:
    """What the processes of a trial's last start printed."""
    files = sorted(Path(trial.folder).parent.glob(f"{Path(trial.folder).name}.rank*.log"))
    return "\n".join(f"--- {f.name}\n{f.read_text()[-6000:]}" for f in files)


def _work(trial: Trial, rank: int, port: int) -> None:
    gc.freeze()  # what the server imported is not gone through at the end of each stage
    _own_output(trial, rank)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
    os.environ |= trial.environment
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if trial.world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(trial.world), "LOCAL_WORLD_SIZE": str(trial.world)}
    code = 1
    try:
        code = _train(trial)
    except Exception as error:
        traceback.print_exc()
        code = 2 if type(error).__name__ == "UserError" else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _own_output(trial: Trial, rank: int) -> None:
    Path(trial.folder).parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(f"{trial.folder}.rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def _train(trial: Trial) -> int:
    import torch

    torch.set_num_threads(1)
    force_strategy(trial.strategy, trial.world)
    from tltrain.core.flags import RunFlags
    from tltrain.core.recipe import validate
    from tltrain.training import run

    if trial.float64:
        use_float64()
    if trial.before is not None:
        module, _, name = trial.before.rpartition(".")
        plant: Callable[..., None] = getattr(importlib.import_module(f"benchmarks.{module or 'plants'}"), name)
        plant(*trial.arguments)
    flags: dict[str, Any] = {"workers": 0, "folder": Path(trial.folder)} | trial.start
    start = RunFlags(**flags)
    return DONE.get(run.train(validate(trial.recipe, "trial"), start)["outcome"], 1)


@lru_cache(maxsize=1)
def build_operator() -> None:
    """Compile what DeepSpeed needs on CPUs, once for this environment and before any trial: it can take longer than a trial may."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")  # two environments would rebuild it in turns
    code = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True, capture_output=True, timeout=600)


def force_strategy(strategy: str, world: int) -> None:
    """Make Accelerate take a strategy on CPU processes."""
    if strategy == "ddp":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif strategy == "none":
        os.environ.pop("ACCELERATE_USE_CPU", None)
    elif strategy == "fsdp2":
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState._shared_state["_cpu"] = False
    else:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": strategy[-1]}
        os.environ |= {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "DS_ACCELERATOR": "cpu"}


def use_float64() -> None:
    """Compare worlds where rounding cannot hide a mistake."""
    experiment: Any = importlib.import_module("tltrain.training.experiment")
    opened = experiment.open_nets

    def open_nets(*arguments: Any) -> Any:
        nets = opened(*arguments)
        for net in nets:
            if net is not None:
                net.chain.double()
        return nets

    experiment.open_nets = open_nets


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def outcome(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "outcome.json").read_text()))
