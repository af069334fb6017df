"""One GPU: full fine-tuning against other loops, the head stage through the store, memory by cut, host syncs, the matrix rate beside it.

Random images, never zeros: the power that a GPU takes, and so its clock, depends on what it multiplies. `--dry-run` does all of it in
miniature on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_loops, memory, timing
from benchmarks.gpu_loops import LR, Feed, Loop, Pair, Task, ours, synchronise
from benchmarks.timing import Case, Contestant, Lap, Result
from tltrain import backbones, run, setup, staging
from tltrain.blocks import Chain
from tltrain.data import Images, Split
from tltrain.data.arrays import MappedReader
from tltrain.data.images import At
from tltrain.options import Start
from tltrain.recipe import Backbone, Recipe, validate
from tltrain.tracking import read_rows

CLASSES = tuple("0123456789")
SYNC = "called a synchronizing CUDA operation"  # what torch's sync debug mode says


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    nets: dict[str, int]
    """Backbone to images a step."""
    size: int
    num_steps: int
    matrix: int
    num_stored: int
    store_net: str
    workers: int
    precision: str

    @property
    def first(self) -> int:
        """The step at which the clock starts: kernels are chosen by then."""
        return self.num_steps // 4

    @property
    def counted(self) -> int:
        return self.num_steps - 1 - self.first


FULL = Scale({"resnet50": 256, "vit-b16": 128}, 224, 200, 8192, 50_000, "vit-b16", os.cpu_count() or 1, "bf16")
DRY = Scale({"resnet-micro": 8, "vit-tiny": 8}, 32, 8, 256, 40, "vit-tiny", 0, "no")


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="everything in miniature on the CPU: shows that it works, and times nothing")
    parser.add_argument("--rounds", type=int, default=timing.LEAST_ROUNDS, help="A B B A rounds of the loops (default: 7)")
    parser.add_argument("--compile", action="store_true", help="tltrain with --compile as one more contestant")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    given = parser.parse_args(words)
    if not given.dry_run and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --dry-run tries everything on the CPU")
    scale, device = (DRY, torch.device("cpu")) if given.dry_run else (FULL, torch.device("cuda"))
    values = measure(scale, device, 1 if given.dry_run else given.rounds, given.compile)
    if given.json is not None:
        given.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return values


def measure(scale: Scale, device: torch.device, num_rounds: int, compiled: bool) -> dict[str, Any]:
    """Each part prints its figures as it is done."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, in miniature"
    rate = matrix_rate(scale.matrix, device)
    print(f"{name}: {rate / 1e12:.3g} TFLOP/s in the product of random bf16 matrices of {scale.matrix} x {scale.matrix}\n", flush=True)
    results, rows = [], []
    for net in scale.nets:
        result = timing.run_case(case(net, scale, device, compiled), num_rounds, lambda text: print(text, file=sys.stderr, flush=True))
        rows += speeds(result, net, scale, rate)
        results.append(result)
        print(timing.show(result) + "\n", flush=True)
    print("| net | loop | images/s | of the matrix rate |\n|--|--|--:|--:|")
    print("\n".join(f"| {r['net']} | {r['loop']} | {r['images_per_s']:,.0f} | {100 * r['fraction']:.1f} % |" for r in rows) + "\n")
    syncs = {net: host_syncs(net, scale, device) for net in scale.nets}
    for net, (num, num_rows) in syncs.items():
        print(f"{net}: the host waited for the device {num} times in {scale.counted} steps, {num_rows} of which ended with a row")
    stage_s, loss = head_stage(scale)
    what = f"{scale.num_stored:,} images at {scale.size} px, {scale.store_net}"
    print(f"\nhead stage through the store: {what}, {stage_s:.2f} s, loss {loss:.3f}\n", flush=True)
    cuts = [row for net, batch in scale.nets.items() for row in memory.by_cut(net, scale.size, batch, device)]
    print(memory.show(cuts, f"{scale.size} px, {device.type}"))
    values = {"device": name, "matrix_flops_per_s": rate, "speeds": rows, "host_syncs": syncs, "head_stage_s": stage_s}
    return {**values, "memory": [asdict(row) for row in cuts], **timing.as_json(results, timing.about(["timm"]))}


def matrix_rate(side: int, device: torch.device) -> float:
    """FLOP/s of bf16 products of random squares: the median of 50."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(50):
        synchronise()
        began = time.perf_counter()
        torch.mm(a, b)
        synchronise()
        seconds.append(time.perf_counter() - began)
    return float(2 * side**3 / np.median(seconds))


def recipe(net: str, scale: Scale, **changes: Any) -> Recipe:
    """Full fine-tuning at one learning rate; its images come from elsewhere. `changes` are of the stage."""
    data = {"source": "digits", "size": scale.size, "resize": scale.size, "flip": False, "val_fraction": 0, "test_fraction": 0}
    stage = {"name": "all", "unfreeze": "all", "steps": scale.num_steps, "lr": LR, "views": 1, "carry": "last", "schedule": "constant"}
    raw = {"name": f"gpu-{net}", "batch": scale.nets[net], "data": data, "backbone": {"name": net}, "deterministic": False}
    return validate(raw | {"stages": [stage | {"norm_stats": "train", "weight_decay": 0.0} | changes]}, "gpu")


def random_feed(batch: int, scale: Scale, device: torch.device) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(4):
        images = torch.randint(0, 256, (batch, 3, scale.size, scale.size), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, len(CLASSES), (batch,), generator=generator)
        made.append((images.pin_memory(), labels.pin_memory()) if device.type == "cuda" else (images, labels))
    return made


def case(net: str, scale: Scale, device: torch.device, compiled: bool) -> Case:
    """The loops in turns; in bf16 their losses agree to some percent."""
    batches = random_feed(scale.nets[net], scale, device)

    def mine(compile: bool) -> Lap:
        feed = Feed(batches, scale.first, scale.num_steps - 1)
        loss = ours(recipe(net, scale), feed, scale.precision, compile)
        return Lap(feed.seconds, (loss,))

    def theirs(loop: Loop) -> Lap:
        feed = Feed(batches, scale.first, scale.num_steps - 1)
        loss = loop(Task(_chain(net, scale.size), device), feed)
        return Lap(feed.seconds, (loss,))

    contestants = [Contestant("tltrain", partial(mine, False))]
    if compiled:
        contestants.append(Contestant("tltrain --compile", partial(mine, True)))
    contestants += [Contestant(name, partial(theirs, loop), also=(package,)) for name, loop, package in gpu_loops.others()]
    title = f"{net}, {scale.nets[net]} images of {scale.size} px a step, {'bf16' if device.type == 'cuda' else 'fp32'}"
    return Case(title, contestants, "speed", tolerance=0.1, num_steps=scale.counted)


def _chain(net: str, size: int) -> Chain:
    chain = backbones.load(Backbone(name=net), classes=CLASSES, size=size, resize=None, head="new", seed=0).chain
    return chain.freeze(0, norm_stats=True).train()


def speeds(result: Result, net: str, scale: Scale, rate: float) -> list[dict[str, Any]]:
    """Images a second of each loop, and the part of the matrix rate that they make of it (FLOPs of a training step as torch counts)."""
    chain = _chain(net, scale.size)
    with FlopCounterMode(display=False) as counter:
        chain(torch.randint(0, 256, (2, 3, scale.size, scale.size), dtype=torch.uint8)).sum().backward()
    per_image = counter.get_total_flops() / 2
    rows = []
    for row in result.rows:
        images_per_s = scale.counted * scale.nets[net] / row.median
        rows.append({"net": net, "loop": row.name, "images_per_s": images_per_s, "fraction": images_per_s * per_image / rate})
    return rows


def host_syncs(net: str, scale: Scale, device: torch.device) -> tuple[int, int]:
    """(times that the host waited for the device while the steps that count ran, how many of those steps ended with a row)."""

    def on(begins: bool) -> None:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn" if begins else "default")

    made = recipe(net, scale)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ours(made, Feed(random_feed(made.batch, scale, device), scale.first, scale.num_steps - 1, on), scale.precision)
    log_steps = -(-scale.num_steps // 100)
    num_rows = sum((step + 1) % log_steps == 0 for step in range(scale.first, scale.num_steps - 1))
    return sum(SYNC in str(warning.message) for warning in seen), num_rows


def head_stage(scale: Scale) -> tuple[float, float]:
    """(seconds of a head stage of ten epochs whose store is empty at first, its last loss): random images, mapped from a file."""
    stage = {"name": "head", "unfreeze": "head", "steps": None, "epochs": 10, "lr": 1e-3, "norm_stats": "frozen"}
    batch = min(512, scale.num_stored // 2)
    made = recipe(scale.store_net, scale, **stage).model_copy(update={"batch": batch})
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tltrain-gpu-")))
        changes = {"TLTRAIN_CACHE": str(folder / "cache"), "ACCELERATE_MIXED_PRECISION": scale.precision}
        stack.enter_context(mock.patch.dict(os.environ, changes))
        images = random_images(folder / "images.npy", scale)
        stack.enter_context(mock.patch.object(setup, "open_images", return_value=images))
        seconds = stack.enter_context(timed_stages())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        start = Start(folder=folder / "run", workers=scale.workers, store="always", store_images="never", max_device_batch=batch)
        run.train(made, start)
        losses = [row["loss"] for row in read_rows(folder / "run") if row["kind"] == "train"]
    return sum(seconds), float(losses[-1])


def random_images(file: Path, scale: Scale) -> Images:
    draw = np.random.default_rng(0)
    pixels = np.lib.format.open_memmap(file, "w+", np.uint8, (scale.num_stored, scale.size, scale.size, 3))
    for at in range(0, scale.num_stored, 1000):
        part = pixels[at : at + 1000]
        part[:] = draw.integers(0, 256, part.shape, np.uint8)
    pixels.flush()
    numbers = np.arange(scale.num_stored)
    ids = tuple(str(i) for i in numbers)
    split = Split("train", numbers % len(CLASSES), ids, numbers, At(MappedReader(file), numbers))
    return Images(CLASSES, split, None, None, f"random-{scale.num_stored}-{scale.size}")


@contextlib.contextmanager
def timed_stages() -> Any:
    """Seconds of each stage that runs inside the block, from plain weights to plain weights."""
    seconds: list[float] = []

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        out = staging.run_stage(*arguments, **named)
        synchronise()
        seconds.append(time.perf_counter() - began)
        return out

    with mock.patch.object(run, "run_stage", timed):
        yield seconds


if __name__ == "__main__":
    main()
