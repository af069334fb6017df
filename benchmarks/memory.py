"""Memory by cut, with and without --recompute: a GPU's peak over a step, on a CPU the bytes that autograd keeps for backward."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import about
from tltrain.core.recipe import Backbone, Stage
from tltrain.models import factory
from tltrain.models.chain import Chain
from tltrain.models.factory import Loaded
from tltrain.training import optim

CLASSES = tuple(str(i) for i in range(10))


@dataclass(frozen=True)
class Row:
    """One cut of one net."""

    net: str
    cut: str
    """The first group of blocks that trains."""
    trained: int
    """Parameters that train; AdamW and their gradients hold 12 bytes for each."""
    kept: int
    """Bytes: on a GPU the most that a step held; on a CPU what autograd kept between forward and backward."""
    recomputed: int
    """The same with recompute; on a CPU with the largest block on top, which lives again while its gradients are computed."""


def main(words: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--nets", nargs="+", default=["resnet50", "vit-b16"], help="backbones (default: resnet50 vit-b16)")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=None, help="images (default: 2 on a CPU, 128 on a GPU)")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    given = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = given.batch or (128 if device.type == "cuda" else 2)
    rows = [row for name in given.nets for row in by_cut(name, given.size, batch, device)]
    print(show(rows, f"{batch} images at {given.size} px, {device.type}"))
    if given.json is not None:
        values = {**about([]), "batch": batch, "size": given.size, "device": device.type, "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return rows


def by_cut(name: str, size: int, batch: int, device: torch.device) -> Iterator[Row]:
    """From the head alone to the whole net."""
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loaded = factory.load(Backbone(name=name), classes=CLASSES, size=size, resize=None, head="new", seed=0)
    measure = _peak if device.type == "cuda" else _kept
    for cut in cuts(loaded.chain):
        bytes_held = [measure(loaded, images, cut, recompute) for recompute in (False, True)]
        first = loaded.chain.index(cut)
        trained = sum(p.numel() for i in range(first, len(loaded.chain.blocks)) for _, p in loaded.chain.parameters_of(i))
        yield Row(name, cut, trained, *bytes_held)


def cuts(chain: Chain) -> list[str]:
    """Groups of a ResNet's blocks, about six cuts of a ViT; the head first, all last."""
    groups = list(dict.fromkeys(b.name.split(".")[0] if b.name.startswith("layer") else b.name for b in chain.blocks))
    every = max(1, len(groups) // 6)
    return [*list(reversed(groups))[:-1:every], "all"]


def _kept(loaded: Loaded, images: Tensor, cut: str, recompute: bool) -> int:
    chain = loaded.chain.freeze(loaded.chain.index(cut), norm_stats=False).train()
    chain.recompute = recompute
    kept = saved_bytes(lambda: chain(images))
    chain.recompute = False
    if not recompute:
        return kept
    with torch.no_grad():
        inputs = [images] + [chain(images, stop=i) for i in range(1, len(chain.blocks))]
    training = range(chain.training_from, len(chain.blocks))
    return kept + max(saved_bytes(lambda i=i: chain(inputs[i], start=i, stop=i + 1), inputs[i]) for i in training)  # type: ignore[misc]


def saved_bytes(forward: Callable[[], Tensor], but: Tensor | None = None) -> int:
    """Bytes of what autograd saves in a forward pass for its backward: each storage once, parameters and `but` left out."""
    seen: dict[int, Tensor] = {}
    parameters: set[int] = set() if but is None else {but.untyped_storage().data_ptr()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_leaf and tensor.requires_grad:
            parameters.add(tensor.untyped_storage().data_ptr())
        seen[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(t.untyped_storage().nbytes() for address, t in seen.items() if address not in parameters)


def _peak(loaded: Loaded, images: Tensor, cut: str, recompute: bool) -> int:
    """Of the third step, when the optimizer has its state: weights, gradients, moments and activations, in bf16 autocast."""
    device = torch.device("cuda")
    chain = loaded.chain.to(device).freeze(loaded.chain.index(cut), norm_stats=False).train()
    chain.to(memory_format=torch.channels_last if chain.channels_last else torch.contiguous_format)
    chain.recompute = recompute
    trained: list[Any] = [p for p in chain.parameters() if p.requires_grad]
    optimizer = optim.make_optimizer([{"params": trained}], Stage(name="all", unfreeze="all", steps=1, lr=1e-4))
    batch, labels = images.to(device), torch.arange(len(images), device=device) % len(CLASSES)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(chain(batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    chain.recompute = False
    return torch.cuda.max_memory_allocated()


def configure(name: str, value: str) -> None:
    """A plant: what `accelerate launch` would put into the environment for a line of its configuration."""
    os.environ[name] = value


def show(rows: Sequence[Row], what: str) -> str:
    lines = [f"| {what} | trains from | parameters | MB | MB with recompute | of all |", "|--|--|--:|--:|--:|--:|"]
    most = {row.net: row.kept for row in rows if row.cut == "all"}
    for row in rows:
        share = f"{100 * row.kept / most[row.net]:.1f} %"
        lines.append(f"| {row.net} | {row.cut} | {row.trained:,} | {row.kept / 1e6:,.1f} | {row.recomputed / 1e6:,.1f} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
