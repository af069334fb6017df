"""Where channels last pays: full training steps of each family on this machine, contiguous and channels last in turns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import timing
from benchmarks.plants import signal_after
from benchmarks.timing import Case, Contestant, Lap, Result
from tltrain.core.recipe import Backbone, Stage
from tltrain.models import factory
from tltrain.models.chain import Chain
from tltrain.training import optim

NETS = {"resnet-tiny": 32, "resnet18": 64, "resnet50": 64, "vit-s16": 64}
"""Backbone to pixels on a CPU; a GPU takes 224."""
CLASSES = tuple(str(i) for i in range(10))


def main(words: Sequence[str] | None = None) -> list[Result]:
    parser = timing.parser("layouts", __doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS), help=f"backbones (default: {' '.join(NETS)})")
    parser.add_argument("--batch", type=int, default=None, help="images a step (default: 16 on a CPU, 256 on a GPU)")
    parser.add_argument("--steps", type=int, default=None, help="steps a lap (default: 2 on a CPU, 20 on a GPU)")
    return timing.command(parser, _cases, words)


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    gpu = torch.cuda.is_available()
    for name in given.nets[:1] if given.smoke else given.nets:
        size = 224 if gpu and name != "resnet-tiny" else NETS.get(name, 64)
        num_steps = 1 if given.smoke else given.steps or (20 if gpu else 2)
        yield case(name, size, given.batch or (256 if gpu else 16), num_steps, torch.device("cuda" if gpu else "cpu"))


def case(name: str, size: int, batch: int, num_steps: int, device: torch.device) -> Case:
    """Both layouts of one net, at the same weights and random images; the losses differ by the rounding of other kernels."""
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    labels = (torch.arange(batch) % len(CLASSES)).to(device)
    return Case(
        title=f"{name}, {batch} images at {size} px on {device.type}",
        contestants=[Contestant(what, _lap(name, images, labels, num_steps, last)) for what, last in LAYOUTS.items()],
        measure="speed",
        tolerance=0.05,
        num_steps=num_steps,
    )


LAYOUTS = {"contiguous": False, "channels last": True}


def _lap(name: str, images: Tensor, labels: Tensor, num_steps: int, last: bool) -> Callable[[], Lap]:
    spec = Stage(name="all", unfreeze="all", steps=1, lr=1e-4, optimizer="sgd")
    loaded = factory.load(Backbone(name=name), classes=CLASSES, size=images.shape[-1], resize=None, head="new", seed=0)
    chain = loaded.chain.to(images.device).freeze(0, norm_stats=False).train()
    start = {key: value.clone() for key, value in chain.net.state_dict().items()}

    def step(optimizer: torch.optim.Optimizer) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
            loss = F.cross_entropy(chain(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def run() -> Lap:
        with mock.patch.object(Chain, "channels_last", last):
            chain.to(memory_format=torch.channels_last if last else torch.contiguous_format)
            chain.net.load_state_dict(start)
            optimizer = optim.make_optimizer([{"params": list(chain.parameters())}], spec)
            step(optimizer)
            began = _now(images.device)
            losses = [step(optimizer) for _ in range(num_steps)]
            seconds = _now(images.device) - began
        return Lap(seconds, (float(losses[-1]),))

    return run


def stop_with_channels_last(num_steps: int) -> None:
    """A plant: a run in the layout of a GPU, stopped after a number of steps."""
    Chain.channels_last = True  # type: ignore[assignment, method-assign]
    signal_after(num_steps)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
