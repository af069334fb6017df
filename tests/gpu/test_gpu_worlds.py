"""On one GPU, every strategy with one process, and two processes that share it, end where a plain process does."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ALL, made_recipe
from gpu_device import losses, on_gpu, running_on
from gpu_world import Worlds

from benchmarks import trials
from benchmarks.trials import distance
from benchmarks.world import Trial
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.training.run import train

FIXED = {"carry": "last", "eval_epochs": 10, "steps": 3}
STAGES = [
    ALL | FIXED | {"name": "mid", "unfreeze": "block.2", "clip": 0.5, "weight_decay": 0.01},
    ALL | FIXED | {"optimizer": "sgd", "lr": 0.05},
]
START: dict[str, dict[str, Any]] = {"plain": {}, "compile": {"compile": True}, "recompute": {"recompute": True}}
DISTRIBUTED = {"ddp": "MULTI_GPU", "pair": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
UNITS = {"", "net.vit.embeddings", *(f"net.vit.layers.{i}" for i in range(4))}
LIMIT_S = 180
"""The first test of a device waits for all the runs."""


def cases(kinds: dict[str, list[str]], on_cpu: set[str]) -> list[Any]:
    """Each on a GPU, and some on the CPU."""
    names = [f"{strategy}-{how}" for strategy, hows in kinds.items() for how in hows]
    return [*(pytest.param("cpu", n, marks=pytest.mark.slow) for n in names if n in on_cpu), *(on_gpu("cuda", n) for n in names)]


EXACT = cases({"ddp": list(START), "fsdp2": list(START), "pair": list(START)}, {"fsdp2-recompute", "pair-plain"})
ZERO = cases({"zero2": ["recompute"], "zero3": ["recompute"]}, {"zero3-recompute"})
BF16 = cases({"fsdp2": ["bf16"], "zero2": ["bf16"], "zero3": ["bf16"]}, set())


@functools.cache
def deepspeed_missing() -> str:
    """Why DeepSpeed cannot be imported here; empty where it can."""
    done = subprocess.run([sys.executable, "-c", "import deepspeed"], capture_output=True, text=True, check=False, timeout=120)
    return "" if done.returncode == 0 else f"DeepSpeed cannot be imported: {(done.stderr.strip().splitlines() or ['?'])[-1]}"


@pytest.fixture(scope="module")
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worlds]]:
    """The runs that the chosen tests ask for, all of them started."""
    wanted: dict[str, set[str]] = {}
    for item in request.session.items:
        if (found := getattr(item, "callspec", None)) is not None and item.path == request.path and "name" in found.params:
            wanted.setdefault(found.params["device"], set()).add(found.params["name"])
    made = {device: Worlds(device) for device in wanted}
    raw = made_recipe(backbone=trials.NETS["vit-tiny"], batch=13, stages=STAGES).model_dump(mode="json")
    for device, names in wanted.items():
        alone = {f"alone-{how(name)}" for name in names}
        for name in sorted(alone) + sorted(names, key=lambda name: "compile" not in name):  # what takes longest first
            strategy, start = name.split("-")
            if strategy.startswith("zero") and deepspeed_missing():
                continue
            folder = tmp_path_factory.mktemp(device) / name
            num, strategy = (2, "ddp") if strategy == "pair" else (1, strategy)
            trial = Trial(raw, str(folder), num, strategy, START.get(start, {}), float64=how(name) == "float64")
            made[device].start(name, trial, "bf16" if start == "bf16" else "no")
    yield made
    for each in made.values():
        each.close()


def how(name: str) -> str:
    """The precision of a run. DeepSpeed has no float64 of its own."""
    return "bf16" if name.endswith("bf16") else "fp32" if name.startswith("zero") or name.endswith("fp32") else "float64"


def check_spread(run: Path, device: str, name: str) -> None:
    """It went as it was asked to."""
    said = json.loads((run / "env.json").read_text())["accelerate"]
    strategy = name.split("-")[0]
    assert said["processes"] == (2 if strategy == "pair" else 1)
    assert said["distributed"] == DISTRIBUTED[strategy].replace("GPU", device.upper().replace("CUDA", "GPU"))
    if strategy == "fsdp2":
        stages = [json.loads(line) for line in Path(f"{run}.units").read_text().splitlines()]
        assert [set(stage["units"]) for stage in stages] == [UNITS] * 2
    if device == "cuda":
        assert not list(Path(f"{run}.operators").rglob("*.so")), "nothing was compiled by nvcc: we give the optimizer"


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(("device", "name"), EXACT)
def test_one_gpu_under_every_strategy_ends_where_a_plain_process_does(device: str, name: str, worlds: dict[str, Worlds]) -> None:
    """In float64, where rounding hides nothing; what is compiled divides pixels by 255 as Triton does, to 1e-7."""
    run, alone = worlds[device][name], worlds[device]["alone-float64"]
    check_spread(run, device, name)
    compiled = name.endswith("compile")
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4 if compiled else 1e-9)
    assert distance(run, alone) < (1e-2 if compiled else 1e-9)


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(("device", "name"), ZERO)
def test_zero_with_one_gpu_trains_as_a_plain_process_does(device: str, name: str, worlds: dict[str, Worlds]) -> None:
    if deepspeed_missing():
        pytest.skip(deepspeed_missing())
    run, alone = worlds[device][name], worlds[device]["alone-fp32"]
    check_spread(run, device, name)
    assert losses(run)[0] == pytest.approx(losses(alone)[0], rel=1e-5)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-2)
    assert distance(run, alone) < 0.1


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(("device", "name"), BF16)
def test_the_shipped_precision_trains_alike(device: str, name: str, worlds: dict[str, Worlds]) -> None:
    """bf16 as the configurations say: under autocast where a process is alone, and of the weights themselves where they are sharded."""
    if name.startswith("zero") and deepspeed_missing():
        pytest.skip(deepspeed_missing())
    run, alone = worlds[device][name], worlds[device]["alone-bf16"]
    check_spread(run, device, name)
    assert json.loads((run / "env.json").read_text())["accelerate"]["precision"] == "bf16"
    assert losses(run) == pytest.approx(losses(alone), rel=8e-2, abs=8e-2)


def test_fsdp_that_accelerate_does_not_give_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration in a process that no launcher started, or without a GPU: Accelerate shards nothing then, without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with running_on("cpu"), pytest.raises(UserError, match="asks for FSDP, but FSDP needs GPUs"):
        train(made_recipe(), RunFlags(folder=tmp_path / "run", workers=0))
    assert not (tmp_path / "run").exists()
