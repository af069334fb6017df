"""Images a second that each backbone takes at 224 px on this machine: through the frozen network to a new head, and trained as a whole."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F
from torchvision.models import get_model_weights

from benchmarks.demo_gain import cpu_name
from tltrain.core.recipe import Backbone
from tltrain.models import factory
from tltrain.models.chain import Chain, on_device

NETS = {"resnet18": "IMAGENET1K_V1", "resnet50": "IMAGENET1K_V2", "vit-b16": "google/vit-base-patch16-224-in21k"}
"""Name to the weights that a recipe would take; their tensors are not needed to time it."""
NUM_CLASSES = 10


def head_only(chain: Chain, images_BCHW: torch.Tensor, labels_B: torch.Tensor) -> None:
    """A step of a head behind frozen blocks, computed anew; from a store it costs next to nothing."""
    chain.freeze(len(chain.blocks) - 1, norm_stats=False).train()
    F.cross_entropy(chain(images_BCHW).float(), labels_B).backward()


def everything(chain: Chain, images_BCHW: torch.Tensor, labels_B: torch.Tensor) -> None:
    chain.freeze(0, norm_stats=False).train()
    F.cross_entropy(chain(images_BCHW).float(), labels_B).backward()


def images_per_s(step: Callable[[], None], batch: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return batch / (time.perf_counter() - began)


def measure(name: str, size: int, batch: int, rounds: int, device: torch.device) -> tuple[int, list[list[float]]]:
    """(parameters of the network with its own head, images a second of each way in each round)."""
    classes = [str(i) for i in range(NUM_CLASSES)]
    chain = on_device(factory.load(Backbone(name=name), classes=classes, size=size, resize=None, head="new", seed=0).chain, device)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    labels, ways = torch.arange(batch, device=device) % NUM_CLASSES, (head_only, everything)
    speeds: list[list[float]] = [[], []]
    for r in range(rounds + 1):
        for found, way in zip(speeds, ways, strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                speed = images_per_s(lambda way=way: way(chain, images, labels), batch, device)  # type: ignore[misc]
            if r:  # the first round warms up
                found.append(speed)
    return sum(p.numel() for p in chain.parameters()), speeds


def accuracy(name: str) -> str:
    """Top-1 on ImageNet of the weights, as torchvision publishes it."""
    if name not in NETS or not NETS[name].startswith("IMAGENET"):
        return "no ImageNet head"
    metrics = get_model_weights(name)[NETS[name]].meta["_metrics"]["ImageNet-1K"]
    return f"{metrics['acc@1']:.1f} %"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backbones", description=__doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS), help=f"backbones (default: {' '.join(NETS)})")
    parser.add_argument("--size", type=int, default=224, help="side of an image, pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (default: 8)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, both ways in turns (default: 7)")
    arguments = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    print("| backbone | parameters | ImageNet top-1 of its weights | images/s, head only | images/s, everything |\n|--|--:|--:|--:|--:|")
    for name in arguments.nets:
        num, speeds = measure(name, arguments.size, arguments.batch, arguments.rounds, device)
        ways = " | ".join(f"{statistics.median(found):.3g} ({min(found):.3g} to {max(found):.3g})" for found in speeds)
        print(f"| `{name}` | {num / 1e6:.1f} M | {accuracy(name)} | {ways} |", flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"one thread of {cpu_name()}"
    print(f"\nmedian (least to most) of {arguments.rounds} rounds, {arguments.size} px, {where}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
