"""The Accelerate set-up of one process: rank, device, precision, collectives.

The strategy comes from Accelerate's configuration alone. No other module outside this folder depends on which one it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor

from tltrain.core.errors import UserError
from tltrain.core.host.memory import keep_freed_memory, return_freed_memory


@contextlib.contextmanager
def torch_settings_kept() -> Iterator[None]:
    """Restores torch's process-wide settings on exit. Wrap every Runtime in it: a notebook may go on to other work afterwards."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, settings.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # This switch and not the newer `fp32_precision`: torch.compile reads this one, and torch refuses a mix of the two.
    matmul_tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn_only)
        torch.backends.cudnn.benchmark, settings.fill_uninitialized_memory = before[1:]
        if torch.backends.cuda.matmul.allow_tf32 != matmul_tf32:
            torch.backends.cuda.matmul.allow_tf32 = matmul_tf32


def rounds_products(device: str, precision: str) -> bool:
    """Whether fp32 matrix products and convolutions use TF32: factors with a 10-bit mantissa in place of 23 bits, sums in fp32.

    TF32 is several times faster on GPUs that support it, and others ignore it. NVIDIA_TF32_OVERRIDE=0 turns it off.
    """
    return device == "cuda" and precision == "no" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"


class Runtime:
    """This process among the processes of a run: rank, device, precision, and collective calls."""

    def __init__(self, deterministic: bool, timeout_s: float = 600.0) -> None:
        """Changes torch's process-wide settings, so create it inside `torch_settings_kept`. Raises UserError for a wrong launch.

        timeout_s: a collective call that takes longer raises an error, seconds.
        """
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, before its first call
        torch.use_deterministic_algorithms(deterministic)
        # Deterministic mode also fills every new tensor with a value, a debugging aid that costs a second write.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = not deterministic
        # Buffers are frozen or kept equal by synchronised BatchNorm. Broadcasting them in every step would only hide a drift.
        handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        if expected > 1:  # DeepSpeed on CPUs needs its backend named: else each process starts a world of one
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
        if self.device.type == "cpu":
            keep_freed_memory()
        self.reset_peak()
        self.local_rank = self.accelerator.local_process_index
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or self.world)
        scaler = self.accelerator.scaler
        self.fresh_scaler = None if scaler is None else scaler.state_dict()
        if self.world != expected or (expected > 1 and self.accelerator.distributed_type == DistributedType.NO):
            raise UserError(
                f"the launcher started {expected} processes, but they did not form a group (no CPU flag on a machine without GPUs); "
                "set ACCELERATE_USE_CPU=true, or start one process"
            )
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.accelerator.distributed_type != DistributedType.FSDP:
            raise UserError(
                "the accelerate configuration asks for FSDP, but FSDP needs GPUs and processes started by `accelerate launch` or "
                "`tltrain launch`; use one of these commands on a machine with GPUs, or choose ddp.yaml, one_gpu.yaml or cpu.yaml"
            )
        # One for the whole run: a gloo group is a mesh of sockets that stay open.
        self.side: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if self.world > 1 else None
        if self.accelerator.gradient_accumulation_steps != 1:
            steps = self.accelerator.gradient_accumulation_steps
            raise UserError(
                f"the accelerate configuration sets gradient_accumulation_steps to {steps}; remove it: it follows from the recipe's batch"
            )

    def seed(self, number: int) -> None:
        """Seed torch on this process's devices. torch.manual_seed is not used: it stores a stack trace for every absent device type."""
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate a tensor over processes along its first dimension. Its shape must be the same on all. Collective."""
        return x if self.world == 1 else self.accelerator.gather(x)

    def share(self, value: Any) -> Any:
        """Broadcast process 0's value to every process. Collective."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def reset_peak(self) -> None:
        """Begin `peak_bytes` anew: what an earlier run of this process took is not this one's. Outside Linux the host's peak stays."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size

    def peak_bytes(self) -> int:
        """Peak memory of this process in bytes since `reset_peak`: GPU memory on a GPU, else resident host memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(OSError):
            peak = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
            if peak is not None:
                return 1024 * int(peak[1])
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def close(self) -> None:
        return_freed_memory()
        self.accelerator.end_training()
