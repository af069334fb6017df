"""One process or many, one strategy or another: the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL, HEAD, slow
from safetensors.torch import load_file
from world_recipe import FIXED, losses, recipe, stages

from benchmarks import world
from benchmarks.trials import distance
from benchmarks.world import Trial
from tltrain.runs.metrics_log import read_rows

FIGURES = ("n", "loss", "top1", "top5", "f1_macro", "precision_weighted", "ece")


def figures(run: Path) -> list[list[float]]:
    """What every evaluation found, on val, on test, and of the teacher."""
    return [[row[name] for name in FIGURES] for row in read_rows(run) if row["kind"] in ("teacher", "val", "test")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Any:
    """The run of one process, for each net, with and without a teacher, in float64."""
    made: dict[tuple[str, bool], Path] = {}

    def get(backbone: str, taught: bool) -> Path:
        if (backbone, taught) not in made:
            folder = tmp_path_factory.mktemp("reference") / "run"
            spec = recipe(backbone, finished_run if taught else None)
            made[backbone, taught] = world.finish(Trial(spec, str(folder), float64=True))
        return made[backbone, taught]

    return get


@pytest.mark.parametrize(
    ("strategy", "num", "backbone", "taught", "device_batch"),
    [
        ("ddp", 1, "resnet-tiny", False, 5),
        ("ddp", 2, "resnet-tiny", False, None),
        ("ddp", 3, "resnet-tiny", True, 2),
        slow("ddp", 4, "resnet-tiny", False, None),
        slow("ddp", 2, "vit-tiny", True, 3),
        slow("ddp", 3, "vit-tiny", False, None),
        slow("ddp", 4, "vit-tiny", False, 2),
        slow("fsdp2", 2, "resnet-tiny", True, 2),
        slow("fsdp2", 3, "resnet-tiny", False, None),
        ("fsdp2", 2, "vit-tiny", False, None),
        slow("fsdp2", 4, "vit-tiny", True, 2),
    ],
)
def test_the_world_changes_nothing(
    strategy: str, num: int, backbone: str, taught: bool, device_batch: int | None, reference: Any, finished_run: Path, tmp_path: Path
) -> None:
    """Three stages in float64: final weights, every loss and every evaluation to 1e-9.

    13 images a step and 19 an evaluation: no number of processes divides them.
    """
    spec = recipe(backbone, finished_run if taught else None)
    start = {} if device_batch is None else {"max_device_batch": device_batch}
    run = world.finish(Trial(spec, str(tmp_path / "run"), num, strategy, start, float64=True))
    assert distance(run, reference(backbone, taught)) < 1e-9
    assert losses(run) == pytest.approx(losses(reference(backbone, taught)), rel=1e-9)
    want = figures(reference(backbone, taught))
    assert len(want) == 7 + taught
    assert [each[0] for each in want] == [19] * len(want)
    assert [pytest.approx(each, rel=1e-9, abs=1e-12) for each in want] == figures(run)


@pytest.mark.parametrize(
    ("backbone", "strategy", "num"),
    [
        ("vit-tiny", "zero3", 2),
        *(slow("vit-tiny", *where) for where in (("zero2", 2), ("zero3", 3))),
        *(slow("resnet-tiny", *where) for where in (("zero2", 2), ("zero3", 2), ("zero3", 3))),
    ],
)
def test_zero_starts_as_one_process_does(backbone: str, strategy: str, num: int, finished_run: Path, tmp_path: Path) -> None:
    """fp32 without a float64 mode: the first losses of each stage to 1e-5, and the frozen blocks bit for bit."""
    taught = finished_run if backbone == "vit-tiny" else None
    one = world.finish(Trial(recipe(backbone, taught), str(tmp_path / "one")))
    many = world.finish(Trial(recipe(backbone, taught), str(tmp_path / "many"), num, strategy))
    assert losses(many)[:2] == pytest.approx(losses(one)[:2], rel=1e-5)
    assert losses(many) == pytest.approx(losses(one), rel=1e-2)
    after_head, after_middle = (load_file(many / "stages" / name / "weights.safetensors") for name in ("0-head", "1-mid"))
    first = [k for k in after_head if k.startswith(("conv1", "bn1", "layer1", "vit.embeddings", "vit.layers.0"))]
    assert first
    assert all(torch.equal(after_head[k], after_middle[k]) for k in first)
    trained = [
        k for k in after_head if k.startswith(("layer3", "vit.layers.2")) and after_head[k].is_floating_point() and "running" not in k
    ]
    assert sum(not torch.equal(after_head[k], after_middle[k]) for k in trained) > len(trained) // 2


@pytest.mark.parametrize("num", [slow(2), 3])
def test_batchnorm_statistics_are_those_of_the_global_batch(num: int, tmp_path: Path) -> None:
    spec = recipe("resnet-tiny", stages=stages("resnet-tiny", norm_stats="train"))
    one = world.finish(Trial(spec, str(tmp_path / "one"), float64=True))
    many = world.finish(Trial(spec, str(tmp_path / "many"), num, float64=True))
    assert distance(many, one) < 1e-9
    assert "images share a forward pass" in (many / "plan.txt").read_text()


@pytest.mark.parametrize("strategy", ["ddp", slow("fsdp2"), slow("zero2"), "zero3"])
def test_the_clip_bites_under_every_strategy(strategy: str, tmp_path: Path) -> None:
    """One step of SGD at learning rate 1 moves the head, which starts at zero, by the clipped norm; the second stage has its own."""
    spec = HEAD | FIXED | {"steps": 1, "optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "schedule": "constant"}
    raw = recipe("resnet-tiny", stages=[spec | {"clip": 1e-3}, spec | {"name": "again", "clip": 2e-3}])
    run = world.finish(Trial(raw, str(tmp_path / "run"), 2, strategy))
    first, second = (load_file(run / "stages" / name / "weights.safetensors") for name in ("0-head", "1-again"))

    def norm(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor] | None) -> float:
        return torch.cat([(a[k] - (b[k] if b else 0)).flatten() for k in ("fc.weight", "fc.bias")]).norm().item()

    assert norm(first, None) == pytest.approx(1e-3, rel=1e-3)
    assert norm(second, first) == pytest.approx(2e-3, rel=1e-3)


@pytest.mark.parametrize("strategy", ["fsdp2", slow("zero2")])
def test_sharded_training_of_batchnorm_statistics_is_refused(strategy: str, tmp_path: Path) -> None:
    trial = Trial(recipe("resnet-tiny", stages=stages("resnet-tiny", norm_stats="train")), str(tmp_path / "run"), 2, strategy)
    assert world.run(trial) == [2, 2]
    assert "norm_stats: train" in world.log(trial)
    assert "ddp.yaml" in world.log(trial)


@pytest.mark.parametrize("backend_given", [False, True])
def test_processes_that_do_not_form_a_world_are_refused(backend_given: bool, tmp_path: Path) -> None:
    """Without a CPU flag Accelerate makes each process a run of its own, or a world that synchronises nothing; without a word."""
    trial = Trial(recipe("resnet-tiny"), str(tmp_path / "run"), 2, "none", before="say_gloo" if backend_given else None)
    codes = world.run(trial)
    assert 2 in codes, codes  # one that is late may find the other gone, which is a failure of the machine
    assert 0 not in codes, codes
    assert "they did not form a group" in world.log(trial)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", [slow("fsdp2"), slow("zero2"), "zero3"])
def test_patience_ends_a_sharded_stage_and_not_the_run(strategy: str, tmp_path: Path) -> None:
    early = HEAD | {"name": "early", "steps": 9, "lr": 1e-9, "patience": 1, "eval_epochs": 0.2}
    run = world.finish(Trial(recipe("resnet-tiny", stages=[early, ALL | {"steps": 2}]), str(tmp_path / "run"), 2, strategy))
    ends = [row for row in read_rows(run) if row["kind"] == "stage_end"]
    assert [(end["stage"], end["reason"]) for end in ends] == [("early", "early"), ("all", "finished")]
    assert ends[0]["step"] < 9
