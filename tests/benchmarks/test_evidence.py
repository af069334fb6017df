"""The benchmark of evidence: the variants of its question of methods, and which of them are trained."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import evidence
from benchmarks.demo_gain import cpu_name
from tltrain.core import recipe as recipes
from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe

VERSIONS = ("tltrain", "python", "torch", "torchvision", "transformers", "numpy")


@pytest.fixture
def recipe() -> Recipe:
    return recipes.parse(recipes.shipped()["folder-small"].read_text(encoding="utf-8"), "folder-small")


def test_the_methods_differ_in_the_last_stage_and_are_as_long(recipe: Recipe) -> None:
    variants = evidence.by_methods(recipe)
    assert next(iter(variants)) == "in stages"
    steps = {title: sum(stage.steps or 0 for stage in variant.stages) for title, variant in variants.items()}
    assert set(steps.values()) == {350}
    last = {title: variant.stages[-1] for title, variant in variants.items()}
    assert (last["biases and norms"].trains, last["LoRA"].trains) == ("biases_and_norms", "lora")
    assert (last["EMA"].carry, last["EMA"].ema, last["blend"].carry) == ("ema", 0.999, "blend")
    assert (last["all at once, layer decay"].unfreeze, last["all at once, layer decay"].views) == ("all", None)
    assert variants["the same, random weights"].backbone.weights is None
    assert len({variant.name for variant in variants.values()}) == len(variants), "each has a folder of its own"


def test_the_first_title_is_what_others_are_compared_with(recipe: Recipe) -> None:
    variants = evidence.by_methods(recipe)
    assert list(evidence._chosen(variants, ["LoRA", "in stages"])) == ["LoRA", "in stages"]
    assert evidence._chosen(variants, None) == variants
    with pytest.raises(UserError, match="--only is 'lora', and no variant is called that; there are: in stages; biases and norms; LoRA"):
        evidence._chosen(variants, ["lora"])


@pytest.fixture
def short() -> dict[str, Recipe]:
    """Two variants of a recipe of a few steps."""
    recipe = recipes.parse(recipes.shipped()["digits-resnet"].read_text(encoding="utf-8"), "digits-resnet")
    cut = recipe.override({"data.per_class": 4, "data.eval_limit": 20, "batch": 10} | {f"stages.{i}.epochs": 1 for i in range(3)})
    return {title: variant for title, variant in evidence.by_stages(cut).items() if title != "head alone, as long"}


@pytest.mark.slow
def test_several_at_a_time_find_what_one_after_the_other_finds(short: dict[str, Recipe], tmp_path: Path) -> None:
    assert list(evidence.train_all(short, tmp_path / "one", 2)) == [1, 2]
    assert list(evidence.train_all(short, tmp_path / "three", 2, num_jobs=3)) == [1, 2]
    one, three = ([replace(row, seconds=[]) for row in evidence.summarise(short, tmp_path / name, 2)] for name in ("one", "three"))
    assert one == three
    weights = [path / "seed-1" / "whole" / "weights.safetensors" for path in (tmp_path / "one", tmp_path / "three")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_figures_of_seeds_that_stand_are_written(short: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def run(recipe: Recipe, path: Path) -> tuple[str, str]:
        asked.append(path)
        if path.parent.name == "seed-2":
            return "failed", "no room"
        path.mkdir(parents=True)
        env = {"versions": dict.fromkeys(VERSIONS, "1"), "hardware": {"device": "NVIDIA X"}, "accelerate": {"precision": "bf16"}}
        (path / "env.json").write_text(json.dumps(env), encoding="utf-8")
        (path / "test_metrics.json").write_text(
            json.dumps({"n": 10, "loss": 1.0, "top1": 0.5 + recipe.seed / 10, "seconds": 3.0}), encoding="utf-8"
        )
        return "finished", ""

    monkeypatch.setattr(evidence, "_train", run)
    words = ["evidence", "stages", "digits-resnet", "--only", "in stages", "all alone, as long", "--seeds", "3", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="seed 2, in stages: failed: no room"):
        evidence.main()
    assert len(asked) == 5, "nothing is trained behind the one that failed"
    found = json.loads((tmp_path / "digits-resnet-stages" / "evidence.json").read_text(encoding="utf-8"))
    assert [row["top1"] for row in found["rows"]] == [[0.5, 0.6]] * 2
    assert found["hardware"].startswith("NVIDIA X (bf16), ")
    assert found["seeds"].startswith("2, of recipe and data")


def test_the_machine_is_said_with_its_gpu_and_how_many_runs_shared_it() -> None:
    environment = {"hardware": {"device": "cpu"}, "accelerate": {"precision": "no"}}
    assert evidence._hardware(environment, 1) == f"{cpu_name()}, one thread of {os.cpu_count()} cores"
    environment["hardware"]["device"] = "NVIDIA H200"
    said = evidence._hardware(environment, 8)
    assert said.startswith("NVIDIA H200 (fp32, products in TF32), ")
    assert said.endswith(" cores, 8 runs at a time")
