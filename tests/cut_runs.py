"""Runs of a head and then from a cut in the middle on, for backbones of every library: stored, computed, and stopped and resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.training.run import train


def stages_of(unfreeze: str) -> list[dict[str, Any]]:
    """Three steps of the head, then four from the block `unfreeze` on."""
    cut = {"name": "cut", "unfreeze": unfreeze, "steps": 4, "lr": 0.01, "layer_decay": 0.8, "carry": "last", "views": 1}
    return [{"name": "head", "unfreeze": "head", "steps": 3, "lr": 0.05, "carry": "last", "views": 1}, cut]


def trained(recipe: Recipe, folder: Path, cache: Any) -> dict[str, Tensor]:
    """The weights of a whole run."""
    assert train(recipe, RunFlags(folder=folder, workers=0, cache=cache))["outcome"] == "finished"
    return load_file(folder / "weights.safetensors")


def same_stored_computed_and_resumed(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """Asserts that three runs end with equal weights: from a cache, without, and stopped in the second stage. Returns them.

    The run without a cache lies in folder/computed.
    """
    stored = trained(recipe, folder / "stored", "always")
    computed = trained(recipe, folder / "computed", "never")

    def stop(stage: str, step: int) -> None:
        if (stage, step) == ("cut", 2):
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(recipe, RunFlags(folder=folder / "resumed", workers=0, cache="never"), on_step=stop)
    assert (stopped["outcome"], stopped["stage"]) == ("stopped", "cut")
    resumed = trained(recipe, folder / "resumed", "never")
    assert all(torch.equal(stored[n], t) and torch.equal(resumed[n], t) for n, t in computed.items())
    return computed
