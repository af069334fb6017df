"""A head stage of 20 epochs, store cold and filled on the way, against a tuned bare loop over the frozen backbone."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from benchmarks import timing
from benchmarks.contestants import bare_loop, flops, ours, over_frozen, setting
from benchmarks.timing import Aim, Case, Contestant, Lap, Result
from tltrain.core.recipe import Recipe, validate

EPOCHS = 20
# vit-s16, a published size, and not vit-tiny: that one is so small that decoding an image costs as much as its blocks do.
PER_CLASS = {"resnet18": 60, "vit-s16": 30}
"""Backbone to labelled images of each digit: the bare loop takes less than a minute."""
SMALL = {"resnet18": "resnet-micro", "vit-s16": "vit-tiny"}
"""What stands for a backbone in miniature."""


def main(words: Sequence[str] | None = None) -> list[Result]:
    parser = timing.parser("head_stage", __doc__)
    parser.add_argument("--per-class", type=int, help="images of each digit (default: 60 for the ResNet, 30 for the ViT)")
    return timing.command(parser, _cases, words)


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    for backbone, per_class in PER_CLASS.items():
        if given.smoke:
            yield case(recipe(SMALL[backbone], 32, 2, 3))
        else:
            yield case(recipe(backbone, 64, given.per_class or per_class, EPOCHS))


def recipe(backbone: str, size: int, per_class: int, num_epochs: int) -> Recipe:
    """The head alone on digits, all of them training images."""
    data = {"source": "digits", "size": size, "resize": size, "per_class": per_class, "flip": False, "val_fraction": 0, "test_fraction": 0}
    stage = {"name": "head", "unfreeze": "head", "epochs": num_epochs, "lr": 1e-3, "views": 1, "carry": "last"}
    raw = {"name": f"head-{backbone}", "batch": min(50, 10 * per_class), "data": data, "backbone": {"name": backbone}, "stages": [stage]}
    return validate(raw, "head stage")


def case(recipe: Recipe) -> Case:
    of = setting(recipe)
    frozen, trained = flops(of)
    num_epochs = recipe.stages[0].epochs or 0

    def bare() -> Lap:
        loop = bare_loop(of, over_frozen(of))
        return Lap(loop.whole_s, (loop.loss,))

    def stored() -> Lap:
        done = ours(recipe, "always", cache=None)
        return Lap(done.stage_s, (done.loss,))

    best = num_epochs * (frozen + trained) / (frozen + num_epochs * trained)
    num, size = len(of.labels_N), of.images_NCHW.shape[-1]
    counted = f"{frozen:.3g} FLOPs an image frozen, {trained:.3g} trained"
    name = f"{recipe.backbone.name}, {num} images at {size} px, {num_epochs:g} epochs"
    return Case(
        title=f"Head stage: {name}",
        contestants=[Contestant("bare PyTorch", bare), Contestant("tltrain", stored)],
        measure="speed",
        tolerance=1e-3,
        bound=f"one pass over the frozen blocks and not {num_epochs:g}: {best:.1f} times ({counted})",
        aim=Aim("tltrain", "speed", 15),
    )


if __name__ == "__main__":
    main()
