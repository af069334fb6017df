"""What is stored is, on a GPU too, bit for bit what would be computed: wherever its rows are read from, in each precision.

The same tests run on the CPU, which has no device's memory beside the host's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import made_recipe, slow
from gpu_device import losses, on_gpu, trained
from safetensors.torch import load_file

from benchmarks.trials import rows_of
from tltrain.core.recipe import Recipe

FIXED: dict[str, Any] = {"steps": 5, "views": 2, "augment": "light", "carry": "last", "eval_epochs": 0.5}
FAMILIES = {"resnet": ("shipped:resnet-tiny-printed", "layer3"), "vit": ("shipped:vit-tiny-printed", "block.2")}
"""The weights, and the block in the middle that a stage begins to train with."""
PLACES: dict[str, dict[str, Any]] = {
    "the device": {},
    "memory": {"cache_device_gb": 0.0},
    "the disk": {"cache_device_gb": 0.0, "cache_memory_gb": 0.0},
}
"""Where the rows are read from, by the flags that leave no room in a quicker place."""
MICRO: dict[str, Any] = {"max_device_batch": 6}


def small(family: str, **changes: Any) -> Recipe:
    """Two stages: cut in front of the head, and in the middle."""
    weights, middle = FAMILIES[family]
    stages = [FIXED | {"name": "head", "unfreeze": "head", "lr": 0.01}, FIXED | {"name": "mid", "unfreeze": middle, "lr": 0.002}]
    return made_recipe(backbone={"weights": weights}, stages=stages, **changes)


def assert_stored_runs_are_the_computed_one(recipe: Recipe, device: str, precision: str, num_stores: int, folder: Path) -> None:
    """num_stores: that the two stages read from. The first run fills them, the others find them."""
    computed = trained(recipe, folder / "computed", device, precision, cache="never", cache_images="never", **MICRO)
    assert len(losses(computed)) == 10
    want = load_file(computed / "weights.safetensors")
    for place, flags in PLACES.items():
        if device == "cpu" and place == "the device":
            continue
        stored = trained(recipe, folder / place.split()[-1], device, precision, cache="always", **MICRO, **flags)
        assert (stored / "plan.txt").read_text().count(f"read from {place}\n") == num_stores, place
        assert rows_of(stored) == rows_of(computed), place
        got = load_file(stored / "weights.safetensors")
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items()), place


CASES = [("cpu", "resnet", "no"), slow("cpu", "resnet", "bf16"), ("cpu", "vit", "bf16"), slow("cpu", "vit", "no")]


@pytest.mark.parametrize(("device", "family", "precision"), [*CASES, *(on_gpu("cuda", f, p) for f in FAMILIES for p in ("no", "bf16"))])
def test_features_in_front_of_two_cuts(device: str, family: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the training images in two views, and of val."""
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    assert_stored_runs_are_the_computed_one(small(family), device, precision, 4, tmp_path)


@pytest.mark.parametrize(("device", "precision"), [slow("cpu", "bf16"), on_gpu("cuda", "no"), on_gpu("cuda", "bf16")])
def test_features_and_the_answers_of_a_teacher(device: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a ResNet that a ViT learns from; its weights are a run's."""
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    teacher = trained(small("resnet"), tmp_path / "teacher", device, precision, cache="never")
    recipe = small("vit", distill={"teacher": {"weights": str(teacher)}, "weight": 0.5, "temperature": 2.0})
    assert_stored_runs_are_the_computed_one(recipe, device, precision, 6, tmp_path)
