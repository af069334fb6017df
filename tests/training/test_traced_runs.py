"""Runs of networks that were cut by tracing: stored features change nothing, a stopped run goes on, and each export is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from world_trials import stop_and_go_on

from benchmarks import trials, world
from benchmarks.trials import distance
from benchmarks.world import Trial
from tltrain.core.recipe import Backbone
from tltrain.evaluation.exporters import export
from tltrain.models import factory

HEAD = {"name": "head", "unfreeze": "head", "steps": 3, "lr": 0.05, "views": 1, "augment": "none", "carry": "last"}
MIDDLE = {"name": "mid", "steps": 3, "lr": 0.01, "views": 1, "augment": "none", "layer_decay": 0.8, "norm_stats": "frozen", "carry": "last"}
MOBILENET = ("torchvision:mobilenet_v3_small", "features.10")
NETS = [MOBILENET, *(pytest.param(*net, marks=pytest.mark.slow) for net in (("torchvision:swin_t", "features.7"),))]


def recipe(name: str, block: str, **changes: Any) -> dict[str, Any]:
    stages = [HEAD, MIDDLE | {"unfreeze": block}]
    return trials.recipe(backbone={"name": name, "dropout": 0.1}, stages=stages, **changes)


def finish(folder: Path, spec: dict[str, Any], num: int = 1, strategy: str = "ddp", float64: bool = False, **start: Any) -> Path:
    return world.finish(Trial(spec, str(folder), num, strategy, start, float64=float64))


@pytest.mark.parametrize(("name", "block"), NETS)
def test_stored_features_change_nothing_and_torchvision_reads_the_export(name: str, block: str, tmp_path: Path) -> None:
    stored = finish(tmp_path / "stored", recipe(name, block), cache="always")
    computed = finish(tmp_path / "computed", recipe(name, block), cache="never")
    assert f"features before {block}" in (stored / "plan.txt").read_text()
    assert trials.differences(stored, computed) == []
    assert export(stored, "torchvision").folder.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch-export", "onnx"])
def test_programs_of_a_traced_network_are_read_back(target: str, tmp_path: Path) -> None:
    assert export(finish(tmp_path / "run", recipe(*MOBILENET) | {"stages": trials.recipe(stages=[HEAD])["stages"]}), target).folder.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "block"), [MOBILENET])
def test_a_stopped_run_goes_on_bit_for_bit(name: str, block: str, tmp_path: Path) -> None:
    whole = finish(tmp_path / "whole", recipe(name, block), cache="always")
    run = stop_and_go_on(Trial(recipe(name, block), str(tmp_path / "run"), start={"cache": "always"}), 4)
    assert trials.differences(run, whole) == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_two_processes_train_as_one_does(strategy: str, tmp_path: Path) -> None:
    """ShuffleNet has no dropout, whose masks depend on the number of processes."""
    stages = [MIDDLE | {"unfreeze": "all"}]
    spec = trials.recipe(backbone={"name": "torchvision:shufflenet_v2_x0_5"}, stages=stages)
    exact = strategy == "fsdp2"
    one, two = finish(tmp_path / "one", spec, float64=exact), finish(tmp_path / "two", spec, 2, strategy, float64=exact)
    assert distance(two, one) < (1e-9 if exact else 1e-3)


@pytest.mark.slow
def test_recomputing_changes_nothing(tmp_path: Path) -> None:
    spec = recipe(*MOBILENET)
    recomputed, kept = finish(tmp_path / "again", spec, recompute=True), finish(tmp_path / "kept", spec)
    assert trials.differences(recomputed, kept) == []


@pytest.mark.slow
def test_a_whole_graph_can_be_compiled() -> None:
    chain = factory.load(Backbone(name=MOBILENET[0]), classes=("a", "b"), size=32, resize=32, head="new", seed=0).chain
    images = torch.rand(4, 3, 32, 32)
    want = chain(images, stop=6)
    torch.testing.assert_close(torch.compile(chain, backend="aot_eager", fullgraph=True)(images, stop=6), want)
