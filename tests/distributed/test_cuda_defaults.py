"""What a GPU gets by default that a CPU does not, as far as it can be seen without one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import HEAD
from gpu_device import DEVICES, running_on

from tltrain.cache.measure import Machine
from tltrain.core import stage_plan
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.distributed.runtime import Runtime, rounds_products, torch_settings_kept
from tltrain.models import factory
from tltrain.planning import compiling
from tltrain.planning.compiling import COMPILE_S, GAIN, CompileCost, compile_costs, line
from tltrain.training.plan_table import describe_device
from tltrain.training.run import train

Made = Callable[..., Recipe]


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


def test_compiling_pays_where_its_steps_save_more_than_it_takes() -> None:
    """By hand: 1,000 s of steps at 1.36 times the speed take 735 s, and one whole network and a tenth take 60.5 s to compile."""
    found = [CompileCost(900.0, 1.0), CompileCost(100.0, 0.1)]
    assert sum(each.saved_s("bf16") for each in found) == pytest.approx(1000 * (1 - 1 / GAIN["bf16"]) - 1.1 * COMPILE_S)
    assert line(found, "bf16", False).startswith("compile --compile would save about 3 min 24 s: about 16 min 40 s of steps")
    assert line(found, "bf16", True).startswith("compile it saves about 3 min 24 s")
    assert line(found, "no", False).startswith("compile --compile would save about 1 min 53 s")
    few = [CompileCost(10.0, 1.0)]
    assert line(few, "bf16", False).startswith("compile does not pay: --compile would cost about 52 s more")
    assert line(few, "bf16", True).startswith("compile it costs about 52 s more")


def test_what_compiling_is_worth_follows_from_what_a_stage_runs(made_recipe: Made) -> None:
    """A frozen prefix whose answers could be stored is not compiled; fresh views run through the whole network, which is. Half the images
    a process, half the seconds."""
    head = HEAD | {"steps": 4, "epochs": None}
    made = made_recipe(stages=[head | {"views": 1}, head | {"name": "fresh", "views": None}, head | {"name": "all", "unfreeze": "all"}])
    student = factory.load(made.backbone, classes=tuple("0123456789"), size=32, resize=32, head="new", seed=0)
    planned = stage_plan.plan(made, student.chain, 100, has_val=True)
    machine = Machine(torch.device("cpu"), "no", contextlib.nullcontext, 0, 1)
    with mock.patch.object(compiling, "time_frozen", lambda frozen, size, device: (1.0 if frozen.stop is None else 0.75, 0)):
        stored, fresh, whole = compile_costs(student, planned, machine, 1)
        halved = compile_costs(student, planned, machine, 2)
    images = 4 * made.batch
    num_blocks = len(student.chain.blocks)
    assert (stored.steps_s, stored.share) == (images * 3 * 0.25, 1 / num_blocks)
    assert (fresh.steps_s, fresh.share) == (images * (3 * 0.25 + 0.75), 1)
    assert (whole.steps_s, whole.share) == (images * 3, 1)
    assert [each.steps_s for each in halved] == [each.steps_s / 2 for each in (stored, fresh, whole)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_plan_of_a_gpu_says_whether_compiling_pays(device: str, made_recipe: Made, tmp_path: Path) -> None:
    """Nothing is said on a CPU. Its figures come from passes that are timed for real, on both."""
    made = made_recipe(stages=[HEAD])
    with running_on(device):
        train(made, RunFlags(folder=tmp_path / "run", workers=0))
    said = [line for line in (tmp_path / "run" / "plan.txt").read_text(encoding="utf-8").splitlines() if line.startswith("compile")]
    assert [line.split(":")[0].split(" about")[0] for line in said] == ["compile does not pay"] * (device == "cuda")
    student = factory.load(made.backbone, classes=tuple("0123456789"), size=32, resize=32, head="new", seed=0)
    planned = stage_plan.plan(made, student.chain, 100, has_val=True)
    (found,) = compile_costs(student, planned, Machine(torch.device(device), "no", contextlib.nullcontext, 0, 1), 1)
    assert 0 <= found.steps_s < 60
