"""Strong views a second: by the data workers, or by the device from base images that they hand over. The same pixels."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import about
from tltrain.data import Split
from tltrain.data.loader import on_device, train_loader
from tltrain.data.rendering import to_device
from tltrain.data.sampler import SampleRef, SampleStream, Shard
from tltrain.data.views import Batch, Preprocess, Views

NUM_IMAGES = 128
"""So few that each worker keeps them all in memory, as it finds them in a store of base images."""


@dataclass(frozen=True)
class Row:
    """What was measured until the images stand on the device."""

    where: str
    workers: int | None
    """None: the batches stand in the host's memory already."""
    images_per_s: float


@dataclass(frozen=True)
class Photos:
    """Base images made up, 4 to 3, lying and upright. Can be pickled."""

    short: int

    def __call__(self, position: int) -> Image.Image:
        width, height = (self.short * 4 // 3, self.short) if position % 2 else (self.short, self.short * 4 // 3)
        waves_HWC = np.sin(np.arange(height * width * 3).reshape(height, width, 3) * (0.001 * (1 + position)))
        return Image.fromarray((127 + 120 * waves_HWC).astype(np.uint8))


def main(words: Sequence[str] | None = None) -> list[Row]:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.views", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, min(4, cores), cores}), help="default: 1, 4, one a core")
    parser.add_argument("--size", type=int, default=224, help="pixels of a view (default: 224)")
    parser.add_argument("--batch", type=int, default=128, help="images (default: 128)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement (default: 1.5)")
    parser.add_argument("--dry-run", action="store_true", help="everything for real in miniature")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    given = parser.parse_args(words)
    size, batch, seconds, workers = (32, 8, 0.2, [1]) if given.dry_run else (given.size, given.batch, given.seconds, given.workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(head(f"strong views of {size} px, batches of {batch}, {name}, {cores} cores"), flush=True)
    rows, made = [], about([])
    for row in rates(Preprocess(size, size * 8 // 7), batch, workers, seconds, device):
        print(line(row), flush=True)  # each as it is known: a call that is cut off has lost nothing
        rows.append(row)
        if given.json is not None:
            values = {**made, "device": name, "size": size, "batch": batch, "rows": [asdict(row) for row in rows]}
            given.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return rows


def rates(preprocess: Preprocess, batch: int, workers: Sequence[int], seconds: float, device: torch.device) -> Iterator[Row]:
    """Raises AssertionError where the device makes other pixels."""
    read, labels = Photos(preprocess.resize), np.zeros(NUM_IMAGES, dtype=np.int64)
    split = Split("train", labels, tuple(str(i) for i in range(NUM_IMAGES)), np.arange(NUM_IMAGES), read)
    host, rendered = (Views(split, preprocess, "strong", True, 0, on_device=on) for on in (False, True))
    items = [SampleRef(i % NUM_IMAGES, 1) for i in range(batch)]
    handed = rendered.batch(items)
    assert torch.equal(to_device(handed, device)["image"].cpu(), host.batch(items)["image"]), "the device makes other pixels than Pillow"
    for num in workers:
        yield Row("the workers", num, loaded(host, batch, num, seconds, device))
    for num in workers:
        yield Row("the device", num, loaded(rendered, batch, num, seconds, device))
    yield Row("the device alone", None, alone(handed, seconds, device))


def loaded(views: Views, batch: int, workers: int, seconds: float, device: torch.device) -> float:
    """Images a second through the loader to the device, once the batches that were read ahead are gone."""
    ahead = 2 * workers + 2  # each worker has two under way; the first one also makes all its base images
    stream = SampleStream(0, 0, NUM_IMAGES, batch, None, 0)
    loader = train_loader(views, stream, 0, 1_000_000, Shard(), workers, pin=device.type == "cuda")
    with closing(on_device(loader, device)) as batches:  # type: ignore[type-var]
        for _ in range(ahead):
            next(batches)
        _wait(device)
        began, num = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(batches)
            num += 1
        _wait(device)
        return num * batch / (time.perf_counter() - began)


def alone(handed: Batch, seconds: float, device: torch.device) -> float:
    """Images a second from batches in pinned memory, one after the other."""
    if device.type == "cuda":
        handed = {name: tensor.pin_memory() for name, tensor in handed.items()}
    for _ in range(3):
        to_device(handed, device)
    _wait(device)
    began, num = time.perf_counter(), 0
    while time.perf_counter() - began < seconds / 2:
        for _ in range(4):
            to_device(handed, device)
        _wait(device)
        num += 4
    return num * len(handed["position"]) / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def head(title: str) -> str:
    """The first two lines of a Markdown table."""
    return f"| {title}: made by | workers | images/s |\n|--|--:|--:|"


def line(row: Row) -> str:
    return f"| {row.where} | {'' if row.workers is None else row.workers} | {row.images_per_s:,.0f} |"


if __name__ == "__main__":
    from benchmarks import views  # by this name, which workers import without running it

    views.main()
