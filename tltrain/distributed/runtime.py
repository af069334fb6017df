"""Accelerate: processes, devices, precision.

How a run is spread comes from Accelerate's configuration alone; nothing above this file asks which strategy it is.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor

from tltrain.core.errors import UserError


@contextlib.contextmanager
def torch_settings_kept() -> Iterator[None]:
    """Around every Runtime: what it sets holds for the whole process, and a notebook has more in it than a run."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, settings.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    products = (
        torch.backends.cuda.matmul.allow_tf32
    )  # not torch's newer switch beside it: torch.compile reads this one, and both do not mix
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn_only)
        torch.backends.cudnn.benchmark, settings.fill_uninitialized_memory = before[1:]
        if torch.backends.cuda.matmul.allow_tf32 != products:
            torch.backends.cuda.matmul.allow_tf32 = products


def rounds_products(device: str, precision: str) -> bool:
    """Whether matrix products and convolutions in fp32 take their factors in TF32, 10 bits of mantissa and not 23, and add up in fp32:
    several times faster on GPUs that have it, others leave it out. NVIDIA's own switch turns it off."""
    return device == "cuda" and precision == "no" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"


class Runtime:
    """The processes of this run, and what they do together."""

    def __init__(self, deterministic: bool, timeout_s: float = 600.0) -> None:
        """Sets torch's process-wide switches: whoever makes one stands inside `torch_settings_kept`.

        timeout_s: a call between processes that takes longer is an error and not a hang."""
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, before its first call
        torch.use_deterministic_algorithms(deterministic)
        # A debugging aid that comes with it, and writes every new tensor twice.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = not deterministic
        # Buffers are frozen, or kept equal by synchronised BatchNorm: broadcasting them every step would only hide a drift.
        handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        if expected > 1:  # without GPUs DeepSpeed is told its backend, since it would otherwise start each process alone
            on_cpu = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.cuda.is_available()
            backend = "gloo" if on_cpu else None
            handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=timeout_s)))
        self.accelerator = Accelerator(kwargs_handlers=handlers)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.precision = self.accelerator.device, str(self.accelerator.mixed_precision)
        self.tf32 = rounds_products(self.device.type, self.precision)
        if self.tf32:
            torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions have it by default
        self.is_main = self.rank == 0
        self.local_rank = self.accelerator.local_process_index
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or self.world)
        scaler = self.accelerator.scaler
        self.fresh_scaler = None if scaler is None else scaler.state_dict()
        if self.world != expected or (expected > 1 and self.accelerator.distributed_type == DistributedType.NO):
            raise UserError(
                f"the launcher started {expected} processes, but each of them is alone (no CPU flag on a machine without GPUs); "
                "set ACCELERATE_USE_CPU=true, or start one process"
            )
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.accelerator.distributed_type != DistributedType.FSDP:
            raise UserError(
                "the accelerate configuration asks for FSDP, and Accelerate shards nothing here: it does so for GPUs, in processes that "
                "`accelerate launch` or `tltrain launch` starts; start it by one of them, or choose ddp.yaml, one_gpu.yaml or cpu.yaml"
            )
        # one for the whole run: a group of gloo is a mesh of sockets, and nobody closes it
        self.side: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if self.world > 1 else None
        if self.accelerator.gradient_accumulation_steps != 1:
            steps = self.accelerator.gradient_accumulation_steps
            raise UserError(
                f"the accelerate configuration sets gradient_accumulation_steps to {steps}; remove it: it follows from the recipe's batch"
            )

    def seed(self, number: int) -> None:
        """Seed what draws on this process. Not torch.manual_seed: for each kind of device that is not there it keeps a stack trace."""
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate a tensor of equal shape over processes along its first dimension."""
        return x if self.world == 1 else self.accelerator.gather(x)

    def share(self, value: Any) -> Any:
        """Process 0's value, on every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def peak_bytes(self) -> int:
        """Most memory this process has held: of its device where that is a GPU, else of the host."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def close(self) -> None:
        self.accelerator.end_training()
