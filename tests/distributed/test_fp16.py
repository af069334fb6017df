"""fp16 and its loss scale, on the CPU: torch has a loss scale for it and half precision, and only Accelerate asks for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import ALL, HEAD
from safetensors.torch import load_file

from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.distributed import runtime
from tltrain.runs import checkpoint
from tltrain.runs.metrics_log import read_rows
from tltrain.training.run import train

Made = Callable[..., Recipe]
SCALE = 1024.0
CLIP = 1e-3


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are in fp16, with a loss scale that doubles after every step. One run a test: Accelerate remembers its precision."""

    def accelerator(**named: Any) -> Any:
        made = Accelerator(**named)
        monkeypatch.setattr(made.state, "_mixed_precision", "fp16")
        made.native_amp = True
        made.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1)
        return made

    monkeypatch.setattr(runtime, "Accelerator", accelerator)


def _moved_by(made_recipe: Made, run: Path) -> float:
    """How far one step of SGD takes the head, which begins at zero, at learning rate 1. The gradient's norm is far above the clip."""
    spec = HEAD | {"steps": 1, "optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "clip": CLIP, "carry": "last", "schedule": "constant"}
    train(made_recipe(stages=[spec]), RunFlags(folder=run, workers=0))
    head = load_file(run / "weights.safetensors")
    return torch.cat([head["fc.weight"].flatten(), head["fc.bias"]]).norm().item()


def _norm(run: Path) -> float:
    return float(next(row["grad_norm"] for row in read_rows(run) if row["kind"] == "train"))


def test_fp32_clips_to_the_norm(made_recipe: Made, tmp_path: Path) -> None:
    assert _moved_by(made_recipe, tmp_path / "run") == pytest.approx(CLIP, rel=1e-4)
    assert 100 * CLIP < _norm(tmp_path / "run") < 100


@pytest.mark.usefixtures("fp16")
def test_fp16_clips_the_gradient_itself_and_not_the_scaled_one(made_recipe: Made, tmp_path: Path) -> None:
    """What is clipped, and what the row says of it, has the loss scale taken out."""
    assert _moved_by(made_recipe, tmp_path / "run") == pytest.approx(CLIP, rel=1e-4)
    assert 100 * CLIP < _norm(tmp_path / "run") < 100


@pytest.mark.usefixtures("fp16")
def test_each_stage_begins_with_a_fresh_loss_scale(made_recipe: Made, tmp_path: Path) -> None:
    """And within a stage it grows, as the checkpoint of every step says."""
    stages = [HEAD | {"steps": 4}, ALL | {"steps": 3}, ALL | {"name": "more", "steps": 2}]
    outcome = train(made_recipe(stages=stages), RunFlags(folder=tmp_path / "run", workers=0, save_steps=1, keep=100))
    assert outcome["outcome"] == "finished"
    states = [checkpoint.load(path) for path in reversed(checkpoint.committed(tmp_path / "run" / "checkpoints"))]
    scales = {(s.progress.stage, s.progress.step): s.extra["scaler"]["scale"] for s in states if s.extra}
    assert scales == {(stage, step): SCALE * 2**step for stage, last in enumerate((4, 3, 2)) for step in range(1, last)}
