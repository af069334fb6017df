"""A step of a tiny network with all guards on, against a bare PyTorch loop, and the same step in other frameworks beside it."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks import peers, timing
from benchmarks.contestants import Setting, ours, setting
from benchmarks.peers import PEERS, Batches, Losses, Normalised, Task
from benchmarks.timing import Aim, Case, Contestant, Lap, Result
from tltrain.core.recipe import Recipe, validate
from tltrain.data.loader import train_loader
from tltrain.training import stage as staging

LR = 1e-4
"""Low: AdamW makes much of rounding, and at 1e-3 two loops that add up in another order are a percent apart after a hundred steps."""


def main(words: Sequence[str] | None = None) -> list[Result]:
    return timing.command(timing.parser("hot_loop", __doc__), _cases, words)


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    for peer in PEERS:
        if not peer.is_here:
            print(f"{peer.name} is left out: {peer.package} is not installed (pip install -e '.[bench]')", file=sys.stderr)
    yield case(recipe(2, 20) if given.smoke else recipe(64, 300))


def recipe(per_class: int, num_steps: int) -> Recipe:
    """All blocks of a ResNet of 78,000 parameters on digits at 32 px."""
    data = {"source": "digits", "size": 32, "resize": 32, "per_class": per_class, "flip": False, "val_fraction": 0, "test_fraction": 0}
    stage = {"name": "all", "unfreeze": "all", "steps": num_steps, "lr": LR, "views": 1, "norm_stats": "train", "carry": "last"}
    raw = {"name": "hot-loop", "batch": min(64, 10 * per_class), "data": data, "backbone": {"name": "resnet-micro"}, "stages": [stage]}
    return validate(raw, "hot loop")


def case(recipe: Recipe) -> Case:
    of = setting(recipe)
    num_steps = of.stage.num_steps
    first, last = num_steps // 10, num_steps - 4  # the last batches are asked for early by who reads ahead
    num_last = (num_steps - 1) % of.stage.log_steps + 1  # steps in tltrain's last row

    def batches() -> Batches:
        return Batches([(of.images_NCHW[index_B], of.labels_N[index_B]) for index_B in of.order_SB], first, last)

    def peer(train: Callable[[Task], Losses]) -> Lap:
        net = Normalised(copy.deepcopy(of.chain.net), of.chain.mean, of.chain.std, of.chain.layout)  # all in the layout that is faster
        task = Task(net, batches(), of.stage.lr)
        losses = train(task)
        assert len(losses) == num_steps, f"{len(losses)} steps were taken, not {num_steps}"
        return Lap(task.batches.seconds, (torch.stack(losses[-num_last:]).double().mean().item(),))

    def fed() -> Lap:
        memory = batches()
        with mock.patch.object(staging, "train_loader", partial(_feed, of, memory)):
            done = ours(recipe, "never", cache=None)
        return Lap(memory.seconds, (done.loss,))

    def reading() -> Lap:
        clock = batches()
        with mock.patch.object(staging, "train_loader", partial(_read, clock, train_loader)):
            done = ours(recipe, "never", cache=None)
        return Lap(clock.seconds, (done.loss,))

    others = [Contestant(p.name, partial(peer, p.train), also=(p.package,)) for p in PEERS if p.is_here]
    size = of.images_NCHW.shape[-1]
    return Case(
        title=f"Step of {recipe.backbone.name}, batch {recipe.batch} at {size} px",
        contestants=[
            Contestant("bare PyTorch", partial(peer, peers.bare)),
            Contestant("tltrain", fed),
            *others,
            Contestant("tltrain, which also makes the views", reading),
        ],
        measure="time",
        tolerance=1e-3,
        num_steps=last - first,
        bound="1",
        aim=Aim("tltrain", "time", 1.10),
    )


def _feed(of: Setting, memory: Batches, *arguments: Any) -> Iterator[dict[str, torch.Tensor]]:
    """What a loader of ours hands out, from memory."""
    for step in range(len(memory)):
        images, labels = memory[step]
        weight, view = torch.ones(len(labels)), torch.zeros(len(labels), dtype=torch.int64)
        yield {"image": images, "label": labels, "weight": weight, "position": of.order_SB[step], "view": view}


def _read(clock: Batches, load: Callable[..., Iterable[Any]], *arguments: Any) -> Iterator[Any]:
    """Our own loader, with the clock beside it."""
    for step, batch in enumerate(load(*arguments)):
        clock[step]
        yield batch


if __name__ == "__main__":
    main()
