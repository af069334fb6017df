"""One test for both devices: on the CPU it runs wherever the tests do, on a GPU where there is one (`pytest -m gpu tests`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from _pytest.mark import ParameterSet
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs

from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.distributed import runtime
from tltrain.runs.metrics_log import read_rows
from tltrain.training.run import train

LIMIT_S = 60
"""What a test on a GPU may take, where pytest-timeout is installed; a mark of its own, pytest.mark.timeout(seconds), comes before it."""


def on_gpu(*values: Any) -> ParameterSet:
    """Parameters of a test that needs a GPU, and is skipped where there is none."""
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
    return pytest.param(*values, marks=[pytest.mark.gpu, pytest.mark.timeout(LIMIT_S), missing])


CUDA = on_gpu("cuda")
DEVICES = [pytest.param("cpu"), CUDA]
"""For @pytest.mark.parametrize("device", DEVICES)."""
DEVICES_SLOW = [pytest.param("cpu", marks=pytest.mark.slow), CUDA]
"""The same, where the CPU takes more than three seconds."""


def environment(device: str, precision: str = "no") -> dict[str, str]:
    """What Accelerate is told by the environment: the device (cpu, cuda) and the precision (no, bf16, fp16). For a process of its own."""
    return {"ACCELERATE_USE_CPU": "true" if device == "cpu" else "false", "ACCELERATE_MIXED_PRECISION": precision}


@contextlib.contextmanager
def running_on(device: str, precision: str = "no", loss_scale: float | None = None) -> Iterator[None]:
    """Runs of this process, inside: on this device and in this precision, which Accelerate would keep for the whole process.

    loss_scale: that fp16 begins with; torch's own is 65536. fp16 on a CPU: torch has a loss scale for it and half precision, and only
    Accelerate asks for a GPU.
    """

    def made(**named: Any) -> Accelerator:
        init_scale = loss_scale or 65536.0
        if device == "cuda":
            named["kwargs_handlers"] = [*named["kwargs_handlers"], GradScalerKwargs(init_scale=init_scale)]
            return Accelerator(**named)
        accelerator = Accelerator(**named)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        return accelerator

    half_on_cpu = device == "cpu" and precision == "fp16"
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment(device, "no" if half_on_cpu else precision)))
        if half_on_cpu or (device == "cuda" and loss_scale is not None):
            stack.enter_context(mock.patch.object(runtime, "Accelerator", made))
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def trained(
    recipe: Recipe, folder: Path, device: str, precision: str = "no", loss_scale: float | None = None, workers: int = 0, **start: Any
) -> Path:
    """The folder of a run that finished in this process. start: its flags."""
    with running_on(device, precision, loss_scale):
        assert train(recipe, RunFlags(folder=folder, workers=workers, **start))["outcome"] == "finished"
    return folder


def losses(folder: Path) -> list[float]:
    """The loss of each step of a short run."""
    return [float(row["loss"]) for row in read_rows(folder) if row["kind"] == "train"]
