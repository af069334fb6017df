"""One GPU: full fine-tuning against other loops, stages from the store, distillation, JPEG files, memory, beside the matrix rate.

Every row is printed and written as soon as it is known, and what does not fit into --budget-s is left out and named, so that a call that
is cut off has lost nothing. Random images, never zeros: the power that a GPU takes, and so its clock, depends on what it multiplies.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_speeds, gpu_stages, memory, timing
from benchmarks.gpu_speeds import Scale
from benchmarks.gpu_turns import synchronise
from tltrain.core import files

FULL = Scale(
    nets={"resnet50": (256, 10), "vit-b16": (128, 10)}, size=224, warm_steps=6, matrix=8192, precision="bf16",
    head=("vit-b16", 50_000, 20), suffix={"resnet50": "layer4", "vit-b16": "block.10"}, num_images=2560, num_steps=100,
    num_photos=1024, memory_batch=64,
)  # fmt: skip
DRY = Scale(
    nets={"resnet-micro": (8, 2), "vit-tiny": (8, 2)}, size=32, warm_steps=3, matrix=256, precision="no",
    head=("vit-tiny", 40, 2), suffix={"resnet-micro": "layer4", "vit-tiny": "block.2"}, num_images=32, num_steps=8,
    num_photos=16, memory_batch=2,
)  # fmt: skip
NEEDS_S = {"memory": 15, "speeds": 215, "head": 80, "suffix": 110, "distill": 70, "files": 75}
"""With less than that left a part is not begun: what the first three took on an H200 with 3 rounds; no other was timed whole."""


@dataclass
class Book:
    """The rows so far, on the terminal and in a file."""

    file: Path | None
    ends: float
    """On the clock of time.monotonic."""
    values: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        return self.ends - time.monotonic()

    def row(self, part: str, text: str, /, **figures: Any) -> None:
        print(text, flush=True)
        self.values.setdefault(part, []).append(figures | {"text": text})
        self.write()

    def write(self) -> None:
        if self.file is not None:
            files.write_atomic(self.file, json.dumps(self.values, indent=1) + "\n")


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="everything in miniature on the CPU: shows that it works, and times nothing")
    parser.add_argument("--rounds", type=int, default=timing.LEAST_ROUNDS, help="A B B A rounds of the loops (default: 7)")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds in all; what does not fit is left out")
    parser.add_argument("--parts", default=",".join(NEEDS_S), help=f"some of {','.join(NEEDS_S)} (default: all, in this order)")
    parser.add_argument("--also", default="", help=f"more contestants: {','.join(gpu_speeds.ALSO)}")
    parser.add_argument("--only", default="", help="REGEX: of the contestants, these alone")
    parser.add_argument("--nets", default="", help="of the networks, these alone")
    parser.add_argument("--json", type=Path, help="also write everything into this file, row by row")
    parser.add_argument("--race", nargs=2, metavar=("NET", "FLOPS_PER_S"), help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", nargs=2, metavar=("NET", "CONTESTANT"), help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if not given.dry_run and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --dry-run tries everything on the CPU")
    scale, device = (DRY, torch.device("cpu")) if given.dry_run else (FULL, torch.device("cuda"))
    if given.nets:
        scale = scale.only(given.nets.split(","))
    if given.compile_only:
        net, name = given.compile_only
        print(gpu_speeds.compile_only(net, name, scale, device))
        return {}
    unknown = set(given.parts.split(",")) - set(NEEDS_S)
    if unknown:
        parser.error(f"--parts has {', '.join(sorted(unknown))}; there are {', '.join(NEEDS_S)}")
    book = Book(given.json, began + given.budget_s)
    num_rounds = 1 if given.dry_run else given.rounds
    choice = gpu_speeds.Choice(num_rounds, [name for name in given.also.split(",") if name], given.only)
    if given.race:
        gpu_speeds.race(book, given.race[0], scale, device, float(given.race[1]), choice)
    else:
        measure(book, scale, device, given.parts.split(","), choice)
    return book.values


def measure(book: Book, scale: Scale, device: torch.device, parts: Sequence[str], choice: gpu_speeds.Choice) -> None:
    """The parts in order; one that fails costs the others nothing, and ends the process with 1."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, in miniature"
    book.values = {"device": name, **timing.about(["timm", "lightning"]), "failed": [], "left_out": []}
    rate = matrix_rate(scale.matrix, device)
    book.row("matrix", f"{name}: {rate / 1e12:.3g} TFLOP/s in products of random bf16 matrices of {scale.matrix}", flops_per_s=rate)
    with gpu_stages.Scratch(scale, device) as scratch, gpu_speeds.compiling(scale, device, "speeds" in parts, choice) as compilers:
        works: dict[str, Callable[[], None]] = {
            "memory": lambda: cuts(book, scale, device),
            "speeds": lambda: gpu_speeds.speeds(book, scale, rate, choice, compilers, ["--dry-run"] * (device.type == "cpu")),
            "head": lambda: gpu_stages.head(book, scratch),
            "suffix": lambda: gpu_stages.suffix(book, scratch),
            "distill": lambda: gpu_stages.distill(book, scratch),
            "files": lambda: gpu_stages.photos(book, scratch),
        }
        if "speeds" in parts:
            scratch.prepare(parts)  # while others compile: it needs no GPU
        for part, work in works.items():
            if part in parts:
                run_part(book, part, work)
    if book.values["failed"]:
        sys.exit(1)


def run_part(book: Book, part: str, work: Callable[[], None]) -> None:
    if book.left() < NEEDS_S[part]:
        book.values["left_out"].append(part)
        print(f"{part}: left out, {max(0, book.left()):.0f} s are left and it may take {NEEDS_S[part]}", flush=True)
        book.write()
        return
    began = time.monotonic()
    try:
        work()
    except Exception as error:
        traceback.print_exc()
        book.values["failed"].append(part)
        book.row("errors", f"{part}: failed: {type(error).__name__}: {error}")
    book.row("parts", f"{part}: {time.monotonic() - began:.1f} s in all", part=part, seconds=time.monotonic() - began)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def cuts(book: Book, scale: Scale, device: torch.device) -> None:
    rows = []
    for net in scale.nets:
        for row in memory.by_cut(net, scale.size, scale.memory_batch, device):
            rows.append(row)
            what = f"{row.net}, {scale.memory_batch} images of {scale.size} px, trained from {row.cut}"
            text = f"{what}: {row.kept / 1e6:,.1f} MB, {row.recomputed / 1e6:,.1f} MB with --recompute"
            book.row("memory", text, **asdict(row), batch=scale.memory_batch)
    print(memory.show(rows, f"{scale.memory_batch} images at {scale.size} px, {device.type}") + "\n", flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of contestants that failed may still wait
