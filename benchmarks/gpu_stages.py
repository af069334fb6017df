"""Whole runs of `tltrain train` for benchmarks/gpu.py: stages from the store, distillation, and images from JPEG files."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks import photos as photo
from benchmarks.gpu_speeds import CLASSES, Scale, chain_of, count, recipe
from benchmarks.gpu_turns import synchronise
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Backbone, Recipe, validate
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits, Split
from tltrain.data.dataset import Indexed
from tltrain.data.sources.arrays import MappedReader
from tltrain.models import factory
from tltrain.models.metadata import write_weights
from tltrain.runs.metrics_log import read_rows
from tltrain.training import run, setup, stage

DISTINCT = 2048
"""Random images that stand in a file; larger sets show them again."""
PHOTO = (500, 375)


@dataclass(frozen=True)
class TrainedModel:
    stage_s: float
    fill_s: float
    """Part of it that opening the stores took: filling them, and reading them back to where they are read from."""
    images_per_s: float
    """Between the first and the last row: start-up is over."""
    loss: float


class Scratch:
    """A folder, and what several parts read there, made once."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self.scale, self.device = scale, device
        self.num_distinct = min(DISTINCT, max(scale.num_images, scale.head[1]))

    def __enter__(self) -> Scratch:
        self.held = tempfile.TemporaryDirectory(prefix="tltrain-gpu-", ignore_cleanup_errors=True)
        self.folder = Path(self.held.name)
        return self

    def __exit__(self, *error: object) -> None:
        self.held.cleanup()

    def prepare(self, parts: Sequence[str]) -> None:
        if {"head", "suffix", "distill"} & set(parts):
            self.random_images(1)
        if "files" in parts:
            self.photos()

    def random_images(self, num: int) -> DataSplits:
        """num random images of ten classes, mapped from a file."""
        file, size = self.folder / "images.npy", self.scale.size
        if not file.exists():
            pixels = np.lib.format.open_memmap(file, "w+", np.uint8, (self.num_distinct, size, size, 3))
            pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
            pixels.flush()
        numbers = np.arange(num)
        ids = tuple(str(i) for i in numbers)
        split = Split("train", numbers % len(CLASSES), ids, numbers, Indexed(MappedReader(file), numbers % self.num_distinct))
        return DataSplits(CLASSES, split, None, None, f"random-{num}-{size}")

    def photos(self) -> Path:
        """JPEG files of the size that is usual on the web, one folder a class."""
        folder, (width, height) = self.folder / "photos", PHOTO
        if folder.exists():
            return folder
        canvas, draw = photo._picture(2 * width, 2 * height), np.random.default_rng(0)
        places = draw.integers(0, (width, height), (self.scale.num_photos, 2))

        def write(i: int) -> None:
            x, y = places[i].tolist()
            part = canvas.crop((x, y, x + width, y + height))
            (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i % 2 else part).save(folder / str(i % 8) / f"{i:05d}.jpg", quality=90)

        for name in range(8):
            (folder / str(name)).mkdir(parents=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(write, range(self.scale.num_photos)))
        return folder

    def train(self, made: Recipe, images: DataSplits | None, rows_every: int, **flags: Any) -> TrainedModel:
        """A run in this process, without a word, on a store that is empty. images: None for those of the recipe. flags: of Start."""
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True)))
            changes = {"TLTRAIN_CACHE": str(folder / "cache"), "ACCELERATE_MIXED_PRECISION": self.scale.precision}
            stack.enter_context(mock.patch.dict(os.environ, changes))
            stack.enter_context(mock.patch.object(run, "Console", return_value=Console(False)))
            stack.enter_context(mock.patch.object(StagePlan, "log_steps", rows_every))
            if images is not None:
                stack.enter_context(mock.patch.object(setup, "open_images", return_value=images))
            stage_s = stack.enter_context(_timed(run, "run_stage"))
            fill_s = stack.enter_context(_timed(stage, "open_stores"))
            kept: dict[str, Any] = {"folder": folder / "run", "max_device_batch": made.batch, "cache_images": "never"}
            start = RunFlags(**kept | flags)
            ended = run.train(made, start)
            if ended["outcome"] != "finished":
                raise RuntimeError(f"{made.name} {ended['outcome']}: {ended.get('error')}")
            rows = [row for row in read_rows(start.folder or folder) if row["kind"] == "train"]
        between = rows[-1]["time"] - rows[0]["time"]
        num = (rows[-1]["step"] - rows[0]["step"]) * made.batch
        return TrainedModel(sum(stage_s), sum(fill_s), num / max(between, 1e-9), rows[-1]["loss"])


@contextlib.contextmanager
def _timed(where: Any, name: str) -> Iterator[list[float]]:
    """Seconds of each call of a function."""
    seconds: list[float] = []
    function = getattr(where, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        out = function(*arguments, **named)
        synchronise()
        seconds.append(time.perf_counter() - began)
        return out

    with mock.patch.object(where, name, timed):
        yield seconds


def _sized(net: str, batch: int, scale: Scale, **stage: Any) -> Recipe:
    """As in the race, with another batch and stage."""
    made = recipe(next(iter(scale.nets)), scale, norm_stats="frozen", **stage)
    return made.model_copy(update={"batch": batch, "name": f"gpu-{net}", "backbone": Backbone(name=net)})


def head(book: Any, scratch: Scratch) -> None:
    """A head stage whose store is empty at first. Its images are in memory, where tltrain by itself takes no data workers."""
    net, num, epochs = scratch.scale.head
    made = _sized(net, min(512, num // 2), scratch.scale, name="head", unfreeze="head", steps=None, epochs=epochs, lr=1e-3)
    done = scratch.train(made, scratch.random_images(num), 50 if num > 1000 else 1, cache="always", workers=0)
    behind = done.stage_s - done.fill_s
    text = f"head of {net}, {num:,} images, {epochs} epochs: the store is filled in {done.fill_s:.1f} s ({num / done.fill_s:,.0f} images/s)"
    steps = f"{behind:.2f} s behind that, {done.images_per_s:,.0f} images/s in its steps of {made.batch}"
    book.row("head", f"{text}; {steps}", net=net, num=num, epochs=epochs, fill_s=done.fill_s, behind_s=behind, batch=made.batch,
             images_per_s=done.images_per_s, loss=done.loss)  # fmt: skip


def suffix(book: Any, scratch: Scratch) -> None:
    """The last blocks: from the store, and with the frozen ones in each step, against everything trained."""
    scale = scratch.scale
    for net, cut in scale.suffix.items():
        batch = scale.nets[net][0]
        images = scratch.random_images(scale.num_images)
        whole = _sized(net, batch, scale, steps=max(2, scale.num_steps // 2))
        part = _sized(net, batch, scale, name="top", unfreeze=cut, steps=scale.num_steps)
        few = {"rows_every": max(1, scale.num_steps // 8), "workers": _workers(scratch)}
        full = scratch.train(whole, images, cache="never", **few)
        stored = scratch.train(part, images, cache="always", **few | {"workers": 0})  # only its filling reads images
        computed = scratch.train(part, images, cache="never", **few)
        bounds = _bounds(net, cut, scale.size)
        for name, done, bound in (("from the store", stored, bounds[0]), ("frozen blocks in each step", computed, bounds[1])):
            times = done.images_per_s / full.images_per_s
            text = f"{net} from {cut} on, {name}: {done.images_per_s:,.0f} images/s, {times:.2f} times all trained (bound {bound:.2f})"
            book.row("suffix", text, net=net, cut=cut, how=name, images_per_s=done.images_per_s, all_images_per_s=full.images_per_s,
                     times=times, bound=bound, fill_s=done.fill_s)  # fmt: skip


def _bounds(net: str, cut: str, size: int) -> tuple[float, float]:
    """How many times faster than all trained, by FLOPs: with stored features, and with the frozen blocks in each step."""
    chain = chain_of(net, size)
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    first = chain.index(cut)
    full = count(lambda: chain(images).sum().backward())
    chain.freeze(first, norm_stats=False)
    with torch.no_grad():
        features = chain(images, stop=first)
    frozen = count(lambda: chain(images, stop=first))
    trained = count(lambda: chain(features, start=first).sum().backward())
    return full / trained, full / (frozen + trained)


def distill(book: Any, scratch: Scratch) -> None:
    """The first net learns from the last one."""
    scale = scratch.scale
    student, teacher = next(iter(scale.nets)), list(scale.nets)[-1]
    loaded = factory.load(Backbone(name=teacher), classes=CLASSES, size=scale.size, resize=scale.size, head="new", seed=0)
    file = scratch.folder / "teacher.safetensors"
    write_weights(file, loaded.chain.net.state_dict(), loaded.card)
    made = recipe(student, scale, steps=max(4, scale.num_steps // 2), views=1)
    taught = validate(made.model_dump() | {"distill": {"teacher": {"name": teacher, "weights": str(file)}, "weight": 0.5}}, "gpu")
    images = scratch.random_images(scale.num_images)
    few = {"rows_every": max(1, scale.num_steps // 8), "workers": _workers(scratch)}
    alone = scratch.train(made, images, cache="never", **few)
    for name, store in (("stored", "always"), ("in the loop", "never")):
        done = scratch.train(taught, images, cache=store, **few)
        share = done.images_per_s / alone.images_per_s
        text = f"{student} from {teacher}, teacher {name}: {done.images_per_s:,.0f} images/s, {share:.2f} of the student alone"
        book.row("distill", text, student=student, teacher=teacher, how=name, images_per_s=done.images_per_s,
                 alone_images_per_s=alone.images_per_s, fill_s=done.fill_s, loss=done.loss)  # fmt: skip


def photos(book: Any, scratch: Scratch) -> None:
    """The first net from JPEG files, by how its views are made; the race says what it does on pixels in memory."""
    scale = scratch.scale
    net = next(iter(scale.nets))
    epochs = 16 if scratch.device.type == "cuda" else 2  # workers read some epochs ahead before the first step
    steps = scale.num_photos // scale.nets[net][0] * epochs
    made = recipe(net, scale, steps=steps, views=None, augment="strong")
    data = {"source": f"folder:{scratch.photos()}", "resize": None, "flip": True}
    made = validate(made.model_dump() | {"data": made.data.model_dump() | data}, "gpu")
    ways: dict[str, dict[str, Any]] = {
        "decoded each time": {},
        f"decoded each time, {os.cpu_count()} workers": {"workers": os.cpu_count()},
        "base images stored": {"cache_images": "always"},
    }
    if any(field.name == "views" for field in fields(RunFlags)):
        ways = {name: flags | {"views": "host"} for name, flags in ways.items()}
        ways["decoded each time, views on the device"] = {"views": "device", "workers": os.cpu_count()}
        ways["base images stored, views on the device"] = {"cache_images": "always", "views": "device"}
    for name, flags in ways.items():
        if scratch.device.type == "cpu":
            flags = flags | {"workers": 0}
        done = scratch.train(made, None, max(1, steps // 4), cache="never", **flags)
        text = f"{net} from {scale.num_photos:,} JPEGs of {PHOTO[0]} x {PHOTO[1]}, strong views, {name}: {done.images_per_s:,.0f} images/s"
        book.row("files", text, net=net, how=name, images_per_s=done.images_per_s, num_photos=scale.num_photos)


def _workers(scratch: Scratch) -> int:
    return os.cpu_count() or 1 if scratch.device.type == "cuda" else 0
