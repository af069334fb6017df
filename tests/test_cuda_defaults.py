"""What a GPU gets by default that a CPU does not, as far as it can be seen without one."""

from __future__ import annotations

import pytest
import torch
from gpu_device import DEVICES, running_on

from tltrain.runtime import Runtime, rounds_products, torch_settings_kept
from tltrain.setup import describe_device


@pytest.mark.parametrize(
    ("device", "precision", "override", "rounded"),
    [
        ("cuda", "no", None, True),
        ("cuda", "no", "1", True),
        ("cuda", "no", "0", False),
        ("cuda", "bf16", None, False),
        ("cuda", "fp16", None, False),
        ("cpu", "no", None, False),
    ],
)
def test_products_are_rounded_to_tf32_on_a_gpu_in_fp32_alone(
    device: str, precision: str, override: str | None, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if override is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    assert rounds_products(device, precision) == rounded


@pytest.mark.parametrize("device", DEVICES)
def test_a_runtime_rounds_as_it_says_and_leaves_no_trace(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile asks for the same switch, by torch's older name: it must not raise."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    before = torch.backends.cuda.matmul.allow_tf32
    with running_on(device), torch_settings_kept():
        runtime = Runtime(deterministic=True)
        assert runtime.tf32 == (device == "cuda")
        assert torch.get_float32_matmul_precision() == ("high" if runtime.tf32 else "highest")
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize("before", [False, True])
def test_the_switch_for_products_is_as_before(before: bool) -> None:
    own = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = before
        with torch_settings_kept():
            torch.backends.cuda.matmul.allow_tf32 = not before
        assert torch.backends.cuda.matmul.allow_tf32 == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = own


def test_the_start_line_says_what_is_rounded() -> None:
    assert describe_device("NVIDIA H100", "bf16", False) == "device  NVIDIA H100, bf16"
    assert describe_device("NVIDIA H100", "no", False) == "device  NVIDIA H100, fp32"
    assert "products in TF32 (NVIDIA_TF32_OVERRIDE=0" in describe_device("NVIDIA H100", "no", True)
