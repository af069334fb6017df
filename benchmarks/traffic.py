"""Bytes all-reduced in a step of each stage under DDP, counted by a communication hook, against 4 for each parameter that trains."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import trials, world
from benchmarks.plants import own_rank, wrap
from benchmarks.trials import HEAD, LAST, MIDDLE
from benchmarks.world import Trial

CUTS = {"resnet": "layer3", "vit": "block.2"}
TOLERANCE = 0.01


@dataclass(frozen=True)
class Row:
    """One stage."""

    stage: str
    trained: int
    """Parameters that train."""
    per_step: list[int]
    """Bytes of gradients that each step reduces."""
    warm_up: int
    """Bytes of the one backward at the start that is thrown away."""
    statistics: list[int]
    """Bytes of BatchNorm's sums over processes in each step, forward and backward."""

    @property
    def ratio(self) -> float:
        """Of the step that is farthest from 4 bytes a parameter."""
        return max((num / (4 * self.trained) for num in self.per_step), key=lambda ratio: abs(ratio - 1))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("--nets", nargs="+", default=["resnet-micro", "vit-tiny"], help="backbones (default: resnet-micro vit-tiny)")
    parser.add_argument("--processes", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        found = {net: measure(net, given.processes, Path(scratch) / net) for net in given.nets}
    print("| net | stage | parameters that train | bytes a step | of 4 a parameter | warm-up | BatchNorm's, a step |")
    print("|--|--|--:|--:|--:|--:|--:|")
    for net, rows in found.items():
        for row in rows:
            figures = f"{row.trained:,} | {max(row.per_step):,} | {100 * row.ratio:.2f} % | {row.warm_up:,} | {max(row.statistics):,}"
            print(f"| {net} | {row.stage} | {figures} |")
    if given.json is not None:
        given.json.write_text(json.dumps({net: [asdict(row) for row in rows] for net, rows in found.items()}, indent=1) + "\n")
    raise SystemExit(any(abs(row.ratio - 1) > TOLERANCE for rows in found.values() for row in rows))


def measure(net: str, num_processes: int, folder: Path) -> list[Row]:
    """Three stages of a net in fp32, two micro-batches a step; the last trains BatchNorm's statistics where there are any."""
    middle = MIDDLE | {"unfreeze": CUTS[net.split("-")[0]]}
    last = LAST | ({"norm_stats": "train"} if net.startswith("resnet") else {})
    spec = trials.recipe(backbone={"name": net}, stages=[HEAD, middle, last])
    file = folder / "traffic"
    start = {"max_device_batch": 3, "cache": "never"}
    world.finish(Trial(spec, str(folder / "run"), num_processes, start=start, before="traffic.count", arguments=(str(file),)))
    return [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def count(file: str) -> None:
    """A plant: one line for each stage, written by rank 0 as the stage ends."""
    from tltrain.distributed.strategies import Strategy
    from tltrain.training import loop as engine
    from tltrain.training import stage as staging

    counter = _Counter(file)
    _count_sums(counter.seen)
    wrap(staging, "spread", counter.spread)
    wrap(Strategy, "warm_up", counter.warm_up)
    wrap(engine._TrainLoop, "train", counter.train)
    wrap(engine._TrainLoop, "evaluate", counter.evaluate)
    wrap(Strategy, "close", counter.close)


class _Counter:
    """What is called around the functions of the same names."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.seen: dict[str, Any] = {}

    def spread(self, original: Any, *arguments: Any) -> Any:
        spreaded = original(*arguments)
        trained = sum(p.numel() for p in spreaded.chain.parameters() if p.requires_grad)
        self.seen.update(trained=trained, per_step=[], warm_up=0, statistics=[], gradients=0, sums=0)
        # a function without annotations: DDP compares them with types, and in this file they are text
        spreaded.model.register_comm_hook(self.seen, lambda state, bucket: _reduce(state, bucket))
        return spreaded

    def warm_up(self, original: Any, spreaded: Any, *arguments: Any) -> None:
        original(spreaded, *arguments)
        self.seen.update(warm_up=self.seen["gradients"], gradients=0, sums=0)

    def train(self, original: Any, loop: Any, *arguments: Any) -> Any:
        out = original(loop, *arguments)
        self.seen["stage"] = loop.ctx.stage.spec.name
        self.seen["per_step"].append(self.seen["gradients"])
        self.seen["statistics"].append(self.seen["sums"])
        self.seen.update(gradients=0, sums=0)
        return out

    def evaluate(self, original: Any, loop: Any, *arguments: Any) -> Any:
        out = original(loop, *arguments)
        self.seen.update(sums=0)
        return out

    def close(self, original: Any, spreaded: Any) -> None:
        original(spreaded)
        if own_rank() == 0:
            row = {key: self.seen[key] for key in ("stage", "trained", "per_step", "warm_up", "statistics")}
            with open(self.file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")


def _count_sums(seen: dict[str, Any]) -> None:
    """Add the bytes of every sum that BatchNorm makes over processes; its backward sums by the same function."""
    from torch.distributed.nn import functional

    summed = functional._AllReduce.forward

    def forward(ctx: Any, op: Any, group: Any, tensor: Any) -> Any:
        seen["sums"] += tensor.numel() * tensor.element_size()
        return summed(ctx, op, group, tensor)

    functional._AllReduce.forward = staticmethod(forward)  # type: ignore[method-assign]


def _reduce(seen: dict[str, Any], bucket: Any) -> Any:
    """What DDP does by itself, with the bytes counted."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    seen["gradients"] += bucket.buffer().numel() * bucket.buffer().element_size()
    return allreduce_hook(dist.distributed_c10d._get_default_group(), bucket)


if __name__ == "__main__":
    main()
