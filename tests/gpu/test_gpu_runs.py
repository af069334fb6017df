"""Whole runs on a GPU: in every precision the losses of the CPU's fp32, and with `deterministic: true` the same bits twice.

The same tests run on the CPU, where bf16 and fp16 are slow and exact enough to show that the tests can pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL, HEAD, made_recipe, slow
from gpu_device import DEVICES, DEVICES_SLOW, losses, on_gpu, trained
from safetensors.torch import load_file

from benchmarks.trials import rows_of
from tltrain.core.recipe import Recipe
from tltrain.runs import checkpoint

FAMILIES = {"resnet": "shipped:resnet-tiny-printed", "vit": "shipped:vit-tiny-printed"}
EVERY_STEP: dict[str, Any] = {"save_steps": 1, "keep": 100}
SCALE = 1024.0
"""A loss scale that no step of these runs is too large for: with torch's own the first ones may be left out."""
TOLERANCE = {"no": 1e-2, "fp16": 1e-2, "bf16": 4e-2}
"""How far a loss may be from the CPU's in fp32, relative to it or to 1.

Each number that enters a product is rounded by up to 2^-9 of itself in bf16, and by 2^-12 in fp16 and in TF32, which cuDNN's convolutions
take for fp32. A network of ten layers gathers several such errors, and AdamW makes whole steps of gradients that are rounding alone.
On the CPU the largest difference in nine steps of both networks is 8e-3 in bf16 and 2e-3 in fp16; this is five times as much.
"""


def small(family: str, **changes: Any) -> Recipe:
    return made_recipe(backbone={"weights": FAMILIES[family], **changes.pop("backbone", {})}, **changes)


@pytest.fixture(scope="module")
def in_fp32(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """The losses of a family's run on the CPU in fp32."""
    made: dict[str, list[float]] = {}

    def get(family: str) -> list[float]:
        if family not in made:
            made[family] = losses(trained(small(family), tmp_path_factory.mktemp("fp32") / family, "cpu"))
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("device", "precision"), [("cpu", "bf16"), ("cpu", "fp16"), *(on_gpu("cuda", p) for p in TOLERANCE)])
def test_losses_are_those_of_the_cpu_in_fp32(
    device: str, precision: str, family: str, in_fp32: Callable[[str], list[float]], tmp_path: Path
) -> None:
    run = trained(small(family), tmp_path / "run", device, precision, SCALE, **EVERY_STEP)
    want, got = in_fp32(family), losses(run)
    assert len(got) == 9
    assert all(abs(a - b) <= TOLERANCE[precision] * max(1.0, b) for a, b in zip(got, want, strict=True)), (got, want)
    assert got != want, "it ran as the other did"
    states = [checkpoint.load(path) for path in checkpoint.committed(run / "checkpoints")]
    scaled = {s.progress.order[:2]: s.extra["scaler"] for s in states if s.extra}
    # every step of fp16 was scaled, and none left out: the tracker counts those since the scale was last changed
    assert {where: (s["scale"], s["_growth_tracker"]) for where, s in scaled.items()} == (
        {(stage, step): (SCALE, step) for stage, last in enumerate((4, 5)) for step in range(1, last)} if precision == "fp16" else {}
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_overflows_in_fp16_is_left_out(device: str, optimizer: str, tmp_path: Path) -> None:
    """Whatever its optimizer, fused or not: the head stays the zeros that it began with, and the scale is halved in every step."""
    recipe = small("resnet", stages=[HEAD | {"optimizer": optimizer, "steps": 3}])
    run = trained(recipe, tmp_path / "run", device, "fp16", 2.0**60, **EVERY_STEP)
    assert not load_file(run / "weights.safetensors")["fc.weight"].any()
    states = [checkpoint.load(path) for path in reversed(checkpoint.committed(run / "checkpoints"))]
    assert [s.extra["scaler"]["scale"] for s in states if s.extra] == [2.0**59, 2.0**58]


THOROUGH = [
    HEAD | {"steps": 3, "mixup": 0.4},
    ALL | {"steps": 3, "norm_stats": "train", "clip": 0.5, "augment": "strong"},
    ALL | {"name": "sgd", "unfreeze": "all", "steps": 3, "optimizer": "sgd", "lr": 0.05, "cutmix": 0.5},
]
"""What of a stage has kernels of its own: BatchNorm's statistics, dropout, mixing, clipping, both optimizers."""


@pytest.mark.parametrize(
    ("device", "family", "precision"),
    [
        ("cpu", "resnet", "no"),
        ("cpu", "vit", "bf16"),
        slow("cpu", "resnet", "fp16"),
        *(on_gpu("cuda", family, precision) for family in FAMILIES for precision in TOLERANCE),
    ],
)
def test_a_deterministic_run_has_the_same_bits_twice(device: str, family: str, precision: str, tmp_path: Path) -> None:
    """The second time between other tensors on the device."""
    recipe = small(family, stages=THOROUGH, backbone={"dropout": 0.2}, data={"balance": "weights"})
    assert recipe.deterministic
    first = trained(recipe, tmp_path / "first", device, precision, max_device_batch=6)
    beside = [torch.ones(1000 + 333 * i, device=device) for i in range(40)][::3]
    second = trained(recipe, tmp_path / "second", device, precision, max_device_batch=6)
    assert len(beside) == 14
    assert len(losses(first)) == 9
    assert rows_of(second) == rows_of(first)
    ours, theirs = (load_file(run / "weights.safetensors") for run in (second, first))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("device", DEVICES_SLOW)
def test_data_workers_and_pinned_memory_change_no_bit(device: str, tmp_path: Path) -> None:
    """Batches of workers reach a GPU through pinned memory, on a stream beside the one that computes."""
    recipe = small("resnet", stages=THOROUGH[1:2])
    runs = [trained(recipe, tmp_path / str(num), device, "bf16", max_device_batch=6, workers=num) for num in (0, 2)]
    assert rows_of(runs[1]) == rows_of(runs[0])
