"""One test for both devices: on the CPU it runs wherever the tests do, on a GPU where there is one (`pytest -m gpu tests`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from _pytest.mark import ParameterSet
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tltrain import runtime

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
def running_on(device: str, precision: str = "no") -> Iterator[None]:
    """Runs of this process, inside: on this device and in this precision, which Accelerate would keep for the whole process.

    fp16 on a CPU: torch has a loss scale for it and half precision, and only Accelerate asks for a GPU.
    """
    with contextlib.ExitStack() as stack:
        half_on_cpu = device == "cpu" and precision == "fp16"
        stack.enter_context(mock.patch.dict(os.environ, environment(device, "no" if half_on_cpu else precision)))
        if half_on_cpu:
            stack.enter_context(mock.patch.object(runtime, "Accelerator", _fp16_on_cpu))
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def _fp16_on_cpu(**named: Any) -> Accelerator:
    made = Accelerator(**named)
    made.state._mixed_precision = "fp16"
    made.native_amp = True
    made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return made
