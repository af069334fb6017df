"""Bugs that give no error of their own, planted and caught; and what FSDP, Accelerate and checkpoints hold of a stage."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import slow

from benchmarks import trials, world
from benchmarks.schedules import draw_schedules, schedule_problems
from benchmarks.trials import HEAD, LAST, MIDDLE
from benchmarks.world import Trial
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Backbone, validate
from tltrain.distributed import runtime
from tltrain.models import factory
from tltrain.runs import checkpoint
from tltrain.training.run import train

ADAM = LAST | {"optimizer": "adamw", "lr": 0.002}


def caught(tmp_path: Path, stage: dict[str, Any], strategy: str, fault: str, *arguments: Any, num: int = 2) -> str:
    """Plant a bug in a run of one stage, which must fail; its error, as outcome.json and every process's output have it."""
    spec = trials.recipe(stages=[stage])
    start = {"check_steps": 1, "timeout_minutes": 2.0}
    trial = Trial(spec, str(tmp_path / "run"), num, strategy, start, before="bugs.say_who_asks", arguments=(fault, *arguments))
    codes = world.run(trial)
    assert codes == [1] * num, f"{codes}\n{world.log(trial)}"
    assert "asks who is missing" not in world.log(trial), "the guard knows the cause: no sign of life is waited for"
    outcome = world.outcome(tmp_path / "run")
    assert outcome["outcome"] == "failed"
    assert not (tmp_path / "run" / "weights.safetensors").exists(), "nothing is handed out that the guard refused"
    return str(outcome["error"])


def test_a_block_unfrozen_after_wrapping_lets_replicas_drift(tmp_path: Path) -> None:
    error = caught(tmp_path, ADAM, "ddp", "unfreeze_after_wrapping", "layer3.0")
    assert "after step 2 block layer3.0 is not the same on all processes (ranks [1] differ from rank 0)" in error


@pytest.mark.parametrize("strategy", ["ddp", slow("fsdp2"), slow("zero2"), "zero3"])
def test_a_buffer_that_differs_on_one_rank(strategy: str, tmp_path: Path) -> None:
    error = caught(tmp_path, ADAM, strategy, "move_buffer", 2, 1, "layer3.0")
    assert "after step 2 block layer3.0 is not the same on all processes (ranks [1] differ from rank 0)" in error


@pytest.mark.parametrize(("strategy", "num"), [("ddp", 1), slow("fsdp2", 2), ("zero3", 2)])
def test_statistics_that_do_not_train_and_change_on_all_ranks(strategy: str, num: int, tmp_path: Path) -> None:
    error = caught(tmp_path, ADAM, strategy, "move_buffer", 2, None, "layer3.0", num=num)
    assert "the statistics of block layer3.0 are frozen in this stage, but they changed" in error


@pytest.mark.parametrize(("strategy", "num"), [("ddp", 1), ("ddp", 2), slow("fsdp2", 2), slow("zero2", 2), ("zero3", 2)])
def test_a_frozen_block_that_changes(strategy: str, num: int, tmp_path: Path) -> None:
    error = caught(tmp_path, MIDDLE, strategy, "move_frozen", 2, "layer2.0", num=num)
    assert "block layer2.0 is frozen in this stage, but it changed" in error


@pytest.mark.parametrize(
    ("fault", "optimizer", "strategy", "num"),
    [
        ("forget_block", "adamw", "ddp", 1),
        slow("forget_block", "adamw", "fsdp2", 2),
        ("forget_block", "sgd", "ddp", 2),
        ("hold_block", "adamw", "ddp", 2),
        ("hold_block", "sgd", "ddp", 1),
        ("hold_block", "sgd", "fsdp2", 2),
        slow("hold_block", "sgd", "zero3", 2),
    ],
)
def test_a_block_that_the_optimizer_does_not_know_or_move(fault: str, optimizer: str, strategy: str, num: int, tmp_path: Path) -> None:
    stage = {"adamw": ADAM, "sgd": LAST}[optimizer] | {"layer_decay": 0.9}  # so that each block has groups of its own
    error = caught(tmp_path, stage, strategy, fault, "layer3.0", num=num)
    assert "block layer3.0 should train in this stage, but none of its tensors changed" in error


@pytest.mark.parametrize("stage", [ADAM, LAST], ids=["adamw", "sgd"])
@pytest.mark.parametrize("lr", [1e-14, 1e-30])
def test_steps_that_drown_in_rounding_are_no_bug(stage: dict[str, Any], lr: float, tmp_path: Path) -> None:
    world.finish(Trial(trials.recipe(stages=[stage | {"lr": lr}]), str(tmp_path / "run")))


def test_steps_that_fp16_leaves_out_are_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_scaler(**named: Any) -> Any:
        accelerator = Accelerator(**named)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
        return accelerator

    monkeypatch.setattr(runtime, "Accelerator", with_scaler)
    spec = validate(trials.recipe(stages=[ADAM | {"steps": 1}]), "test")
    assert train(spec, RunFlags(folder=tmp_path / "run", workers=0))["outcome"] == "finished"


def test_a_last_step_that_fp16_leaves_out_is_no_bug_of_the_start_that_takes_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start before it took the others, so that the optimizer has moments, and this one changed nothing."""
    factors = iter((1.0, 1.0, float("inf")))

    class TooLargeAtLast(torch.amp.GradScaler):
        def scale(self, outputs: Any) -> Any:
            return super().scale(outputs) * next(factors)

    def with_scaler(**named: Any) -> Any:
        accelerator = Accelerator(**named)
        accelerator.scaler = TooLargeAtLast("cpu", init_scale=64.0)
        return accelerator

    monkeypatch.setattr(runtime, "Accelerator", with_scaler)
    spec, start = validate(trials.recipe(stages=[ADAM | {"steps": 3}]), "test"), RunFlags(folder=tmp_path / "run", workers=0)
    taken = iter([lambda: os.kill(os.getpid(), signal.SIGTERM)])
    assert train(spec, start, lambda stage, step: next(taken, lambda: None)())["outcome"] == "stopped"
    assert trials.position(start.folder or tmp_path)[:2] == (0, 2)
    assert train(spec, start)["outcome"] == "finished"


@pytest.mark.parametrize("backbone", ["resnet-tiny", "vit-tiny"])
def test_every_block_that_is_a_module_is_a_unit_of_fsdp(backbone: str, tmp_path: Path) -> None:
    middle = MIDDLE | {"unfreeze": {"resnet-tiny": "layer3", "vit-tiny": "block.2"}[backbone], "steps": 1}
    spec = trials.recipe(backbone=trials.NETS[backbone], stages=[HEAD | {"steps": 1}, middle])
    file = tmp_path / "units"
    world.finish(Trial(spec, str(tmp_path / "run"), 2, "fsdp2", before="count_units", arguments=(str(file),)))
    stages = [json.loads(line) for line in file.read_text().splitlines()]
    chain = factory.load(Backbone(name=backbone), classes=["a"], size=32, resize=32, head="new", seed=0).chain
    modules = dict(chain.net.named_modules())
    wholes = {f"net.{b.owns[0]}" for b in chain.blocks if any(True for _ in modules[b.owns[0]].children())}
    assert len(wholes) == {"resnet-tiny": 4, "vit-tiny": 5}[backbone]
    assert [set(stage["units"]) for stage in stages] == [wholes | {""}] * 2


@pytest.mark.parametrize(("strategy", "num"), [("ddp", 1), slow("ddp", 2), ("fsdp2", 2), slow("zero2", 2), ("zero3", 2)])
def test_nothing_of_a_stage_stays(strategy: str, num: int, tmp_path: Path) -> None:
    """Not in Accelerate, not in memory, not in the checkpoints of the next one."""
    file = tmp_path / "left"
    trial = Trial(
        trials.recipe(), str(tmp_path / "run"), num, strategy, trials.EVERY_STEP, before="look_for_leftovers", arguments=(str(file),)
    )
    run = world.finish(trial)
    for rank in range(num):
        rows = [json.loads(line) for line in Path(f"{file}.rank{rank}").read_text().splitlines()]
        assert rows == [{"models": 0, "optimizers": 0, "made": 4 * stage, "alive": []} for stage in (1, 2, 3)]
    chain = factory.load(Backbone(name="resnet-tiny"), classes=["a"] * 10, size=32, resize=32, head="new", seed=0).chain
    firsts = [chain.index(str(stage["unfreeze"])) for stage in (HEAD, MIDDLE, LAST)]
    saved = [checkpoint.load(path) for path in checkpoint.committed(run / "checkpoints")]
    assert len(saved) >= 11
    for state in saved:
        assert state.weights.keys() == chain.net.state_dict().keys()
        if state.optimizer:
            trains = range(firsts[state.progress.stage], len(chain.blocks))
            assert set(state.optimizer) == {name for i in trains for name, _ in chain.parameters_of(i)}


@pytest.mark.slow
@pytest.mark.parametrize("case", range(8))
def test_random_schedules_of_freezing_and_unfreezing(case: int, tmp_path: Path) -> None:
    schedule = draw_schedules(trials.seed(), 8)[case]
    assert schedule_problems(schedule, tmp_path) == [], f"TLTRAIN_SEED={trials.seed()}, {schedule}"
