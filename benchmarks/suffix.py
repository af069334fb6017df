"""A stage of the last blocks fed from the warm store, against the same blocks fed from a tensor in memory by a bare loop."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import timing
from benchmarks.contestants import bare_loop, features, flops, measured, ours, over_features, setting
from benchmarks.timing import Aim, Case, Contestant, Lap, Result
from tltrain.core.recipe import Recipe, validate

CASES = (("resnet18", "layer4", 64, 20, 60), ("vit-s16", "block.10", 64, 20, 60))
"""Backbone, the first block that trains, pixels, images of each digit, optimizer steps."""
SMALL = (("resnet-micro", "layer4", 32, 2, 6), ("vit-tiny", "block.2", 32, 2, 6))


def main(words: Sequence[str] | None = None) -> list[Result]:
    return timing.command(timing.parser("suffix", __doc__), _cases, words)


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    for chosen in SMALL if given.smoke else CASES:
        with tempfile.TemporaryDirectory(prefix="tltrain-suffix-") as cache:
            yield case(recipe(*chosen), Path(cache))


def recipe(backbone: str, unfreeze: str, size: int, per_class: int, num_steps: int) -> Recipe:
    """The last blocks on digits, all of them training images."""
    data = {"source": "digits", "size": size, "resize": size, "per_class": per_class, "flip": False, "val_fraction": 0, "test_fraction": 0}
    stage = {"name": "top", "unfreeze": unfreeze, "steps": num_steps, "lr": 1e-4, "views": 1, "carry": "last"}
    raw = {"name": f"suffix-{backbone}", "batch": min(32, 10 * per_class), "data": data, "backbone": {"name": backbone}, "stages": [stage]}
    return validate(raw, "suffix")


def case(recipe: Recipe, cache: Path) -> Case:
    of = setting(recipe)
    features_N = features(of)
    frozen, trained = flops(of)
    first, last = measured(of.stage)

    def bare() -> Lap:
        loop = bare_loop(of, over_features(of, features_N))
        return Lap(loop.loop_s, (loop.loss,))

    def stored() -> Lap:
        done = ours(recipe, "always", cache)
        return Lap(done.loop_s(of.stage), (done.loss,))

    per_image = features_N[0].nbytes / 1000
    return Case(
        title=f"{recipe.backbone.name} from {recipe.stages[0].unfreeze} on, batch {recipe.batch}, {per_image:.1f} KB an image stored",
        contestants=[Contestant("bare PyTorch, tensor in memory", bare), Contestant("tltrain, warm store", stored)],
        measure="speed",
        tolerance=1e-3,
        num_steps=last - first,
        bound=f"1; with the frozen blocks in each step both would take {(frozen + trained) / trained:.2f} times as long, by FLOPs",
        aim=Aim("tltrain, warm store", "speed", 0.9),
    )


if __name__ == "__main__":
    main()
