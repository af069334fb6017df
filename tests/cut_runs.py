"""Runs of a head and then from a cut in the middle on, for backbones of every library: stored, computed, and stopped and resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import trials
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.training.loop import OnStep
from tltrain.training.run import train


def stages_of(unfreeze: str) -> list[dict[str, Any]]:
    """Three steps of the head, then four from the block `unfreeze` on."""
    cut = {"name": "cut", "unfreeze": unfreeze, "steps": 4, "lr": 0.01, "layer_decay": 0.8, "carry": "last", "views": 1}
    return [{"name": "head", "unfreeze": "head", "steps": 3, "lr": 0.05, "carry": "last", "views": 1}, cut]


def trained(recipe: Recipe, folder: Path, cache: Any) -> dict[str, Tensor]:
    """The weights of a whole run."""
    assert train(recipe, RunFlags(folder=folder, workers=0, cache=cache))["outcome"] == "finished"
    return load_file(folder / "weights.safetensors")


def stopping_at(*places: tuple[str, int]) -> OnStep:
    """A hook that asks the run to stop behind these steps, each (stage, step), as the terminal does."""

    def stop(stage: str, step: int) -> None:
        if (stage, step) in places:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def computed_and_stored(recipe: Recipe, folder: Path) -> tuple[Path, Path]:
    """The folders of two finished runs, without caches and with all of them. Asserts that they do not differ."""
    runs = []
    for name, cache in (("computed", "never"), ("stored", "always")):
        start: dict[str, Any] = {"cache": cache, "cache_images": cache}
        assert train(recipe, RunFlags(folder=folder / name, workers=0, **start))["outcome"] == "finished"
        runs.append(folder / name)
    assert trials.differences(runs[1], runs[0]) == []
    return runs[0], runs[1]


def same_stored_computed_and_resumed(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """Asserts that three runs end with equal weights: from a cache, without, and stopped in the second stage. Returns them.

    The run without a cache lies in folder/computed.
    """
    stored = trained(recipe, folder / "stored", "always")
    computed = trained(recipe, folder / "computed", "never")
    stopped = train(recipe, RunFlags(folder=folder / "resumed", workers=0, cache="never"), on_step=stopping_at(("cut", 2)))
    assert (stopped["outcome"], stopped["stage"]) == ("stopped", "cut")
    resumed = trained(recipe, folder / "resumed", "never")
    assert all(torch.equal(stored[n], t) and torch.equal(resumed[n], t) for n, t in computed.items())
    return computed
