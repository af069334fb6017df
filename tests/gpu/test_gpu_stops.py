"""A run on a GPU that was killed or stopped ends where it would have ended, bit for bit. The same tests run on the CPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ALL, HEAD, made_recipe, slow
from gpu_device import DEVICES_SLOW, LIMIT_S, environment, on_gpu, running_on, trained

from benchmarks.trials import differences, position
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.distributed.strategies import Strategy
from tltrain.evaluation import evaluator
from tltrain.runs import checkpoint
from tltrain.training.run import train

ROOT = Path(__file__).resolve().parents[2]
EVERY_STEP: dict[str, Any] = {"save_steps": 1, "keep": 100}
MICRO: dict[str, Any] = {"max_device_batch": 6}
STAGES: list[dict[str, Any]] = [
    HEAD | {"steps": 3, "mixup": 0.4, "eval_epochs": 0.5},
    ALL | {"steps": 4, "eval_epochs": 0.5, "clip": 0.5},
]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet-no": ("shipped:resnet-tiny-printed", {"norm_stats": "train"}),
    "resnet-bf16": ("shipped:resnet-tiny-printed", {"norm_stats": "train", "optimizer": "sgd", "lr": 0.05}),
    "resnet-fp16": ("shipped:resnet-tiny-printed", {"optimizer": "sgd", "lr": 0.02}),
    "vit-bf16": ("shipped:vit-tiny-printed", {}),
    "vit-fp16": ("shipped:vit-tiny-printed", {}),
}
"""A family and a precision, and what is special about the second stage."""
LOSS_SCALE = 2.0**18
"""Too large for the first steps of a stage in fp16, which are left out: a start that forgot the halved scale would leave out others."""
BOUNDARIES = [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
"""(stage, step) of a checkpoint that a run goes on from."""
EVERY = {"resnet-no", "vit-fp16"}
"""Kinds that go on from each of them; the others, of the same code, from one in each stage."""


def small(kind: str) -> Recipe:
    weights, changes = KINDS[kind]
    return made_recipe(backbone={"weights": weights, "dropout": 0.2}, stages=[STAGES[0], STAGES[1] | changes])


def run(kind: str, folder: Path, device: str, **start: Any) -> dict[str, Any]:
    """The outcome of a start in this process."""
    with running_on(device, kind.partition("-")[2], LOSS_SCALE):
        return train(small(kind), RunFlags(folder=folder, workers=0, **MICRO, **start))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The run that nobody disturbs, with all its checkpoints."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, device: str) -> Path:
        if (kind, device) not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            made[kind, device] = trained(small(kind), folder, device, kind.partition("-")[2], LOSS_SCALE, **MICRO, **EVERY_STEP)
        return made[kind, device]

    return get


def killed_after(whole: Path, folder: Path, stage: int, step: int) -> Path:
    """A copy of a run as it stood when this checkpoint was its newest: with rows beyond it, and without an outcome."""
    shutil.copytree(whole, folder)
    for path in checkpoint.committed(folder / "checkpoints"):
        if checkpoint.load(path).progress.order[:2] > (stage, step):
            shutil.rmtree(path)
    for name in ("outcome.json", "report.html", "test_metrics.json", "weights.safetensors"):
        (folder / name).unlink()
    assert position(folder)[:2] == (stage, step)
    return folder


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", "resnet-no"), *(slow("cpu", k) for k in KINDS if k != "resnet-no"), *(on_gpu("cuda", k) for k in KINDS)]
)
def test_a_run_goes_on_from_every_boundary_bit_for_bit(
    device: str, kind: str, undisturbed: Callable[[str, str], Path], tmp_path: Path
) -> None:
    whole = undisturbed(kind, device)
    scales = [s.extra["scaler"]["scale"] for path in checkpoint.committed(whole / "checkpoints") if (s := checkpoint.load(path)).extra]
    assert len(scales) == (5 if "fp16" in kind else 0)
    assert not scales or min(scales) < LOSS_SCALE
    for stage, step in BOUNDARIES if kind in EVERY else BOUNDARIES[1::3]:
        copy = killed_after(whole, tmp_path / f"{stage}-{step}", stage, step)
        assert run(kind, copy, device, take_over=True)["outcome"] == "finished"
        assert differences(copy, whole) == [], (stage, step)


PLACES: dict[str, tuple[Any, str, int]] = {
    "step": (Strategy, "backward", 8),
    "evaluation": (evaluator, "_row", 10),
    "save": (Strategy, "optimizer_state", 2),
}
"""What is called in the middle of a step, of an evaluation, of a save; and the call in which somebody asks the run to stop: the eighth
micro-batch of three a step, the third batch of the second evaluation of seven."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", "resnet-no"), slow("cpu", "vit-fp16"), on_gpu("cuda", "resnet-bf16"), on_gpu("cuda", "vit-fp16")]
)
def test_sigterm_stops_a_run_which_then_goes_on_bit_for_bit(
    device: str, kind: str, place: str, undisturbed: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, name, number = PLACES[place]
    original, calls = getattr(holder, name), []

    def asked_to_stop(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    whole, folder = undisturbed(kind, device), tmp_path / "run"
    monkeypatch.setattr(holder, name, asked_to_stop)
    stopped = run(kind, folder, device, **EVERY_STEP)
    assert (stopped["outcome"], stopped["signal"]) == ("stopped", "SIGTERM")
    assert (0, 0) < position(folder)[:2] < (1, 4)
    assert run(kind, folder, device)["outcome"] == "finished"
    assert differences(folder, whole) == []


@pytest.mark.parametrize("device", DEVICES_SLOW)
def test_a_command_that_is_stopped_ends_with_75(device: str, undisturbed: Callable[[str, str], Path], tmp_path: Path) -> None:
    """What a process of its own has begun goes on in this one, with equal bits."""
    kind, folder = "vit-bf16", tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(small(kind).to_yaml())
    code = (
        "import sys; from benchmarks import plants; from tltrain.cli.main import main; plants.signal_after(2); sys.exit(main(sys.argv[1:]))"
    )
    words = ["train", str(tmp_path / "recipe.yaml"), "--folder", str(folder), "--workers", "0", "--max-device-batch", "6"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | environment(device, "bf16"), cwd=ROOT, timeout=LIMIT_S - 5, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stdout + done.stderr
    assert position(folder)[0] == 0
    assert run(kind, folder, device)["outcome"] == "finished"
    assert differences(folder, undisturbed(kind, device)) == []
