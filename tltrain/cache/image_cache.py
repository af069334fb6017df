"""Cache of one split's base images, decoded and resized once: uint8, memory-mapped. Views are made from the same base images either way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import features
from torch import Tensor
from torch.utils.data import Dataset

from tltrain.cache import disk_store
from tltrain.data import decode
from tltrain.data.dataset import Split
from tltrain.data.views import Batch, Preprocess, base_of
from tltrain.data.workers import Loader, worker_options

KIND = "images"
SHARD_IMAGES = 32
MAPPED = 10_000
"""Shards that one process keeps mapped. They take no memory, but by default Linux allows 65,530 mappings in a process."""

FORMAT = 1
"""Increase it when the code produces other bytes for the same files, so that older caches are not used."""

CODECS = ("jpg", "libjpeg_turbo", "libtiff", "webp", "avif", "jpg_2000", "littlecms2")  # libraries of Pillow that pixels depend on


def key(fingerprint: str, split: str, preprocess: Preprocess) -> dict[str, Any]:
    """Everything that decides the cached bytes, as JSON values. Crop, seed and augmentation do not affect base images.

    fingerprint: of the data set. split: name of the split.
    """
    return {
        "data": fingerprint,
        "split": split,
        "resize": preprocess.resize,
        "interpolation": preprocess.interpolation,
        "images": SHARD_IMAGES,
        "format": FORMAT,
        "pillow": PIL.__version__,
        "codecs": codecs(),
    }


def codecs() -> dict[str, str | None]:
    """Versions of the libraries that Pillow decodes with, and of our own decoding code."""
    known = {*features.modules, *features.codecs, *features.features}  # an older Pillow knows fewer
    libraries = {name: features.version(name) for name in CODECS if name in known}
    return libraries | {"heif": heif_version(), "decoder": str(decode.VERSION)}


def heif_version() -> str | None:
    """The version of pillow-heif. None where it is not installed."""
    return version("pillow-heif") if "HEIF" in decode.formats() else None


class ImageCache:
    """The base images of a split, by position: `cache[i]`, once the store is filled. Its pickle holds no pixels.

    A shard holds the images of SHARD_IMAGES positions: {"pixels": uint8 (num_bytes,), the images one after the other, "size": int32 (n, 2),
    their heights and widths}.
    """

    def __init__(self, folder: Path, split: Split, preprocess: Preprocess) -> None:
        """folder: the path of a Store. Keep that store open while reading, so that it is not evicted."""
        self.folder, self.split, self.preprocess = folder, split, preprocess
        self._files: dict[str, Path] = {}
        self._mapped: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3), read-only and memory-mapped."""
        number, place = divmod(i, SHARD_IMAGES)
        shard = self._mapped.get(number)
        if shard is None:
            if len(self._mapped) >= MAPPED:
                del self._mapped[next(iter(self._mapped))]
            shard = self._mapped[number] = self._map(number)
        height, width = shard.size_N2[place]
        return shard.pixels[shard.ends[place] - 3 * height * width : shard.ends[place]].reshape(height, width, 3)

    def names(self) -> list[str]:
        """Names of the shards, in order."""
        return [f"{number:06d}" for number in range(-(-len(self) // SHARD_IMAGES))]

    def make(self, names: Sequence[str], workers: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, tensors) of each shard in this order, computed by `workers` processes (0: by this one). Raises UserError."""
        numbers = [int(name) for name in names]
        if not numbers:
            return
        shards = Loader(_Shards(self.split, self.preprocess), batch_size=None, sampler=numbers, **worker_options(workers))
        yield from zip(names, shards, strict=True)

    def _map(self, number: int) -> _Shard:
        self._files = self._files or disk_store.list_shards(self.folder)
        tensors = disk_store.read(self._files[f"{number:06d}"])
        pixels, size_N2 = tensors["pixels"].numpy(), tensors["size"].numpy().astype(np.int64)
        pixels.flags.writeable = False
        return _Shard(pixels, size_N2, np.cumsum(3 * size_N2.prod(1)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}, "_mapped": {}}


@dataclass(frozen=True)
class PartOfCache:
    """The base images of a split that are held among those of several, by position in the split."""

    cache: ImageCache
    places_N: np.ndarray
    """(N,) their positions in the cache."""

    def __getitem__(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3), read-only and memory-mapped."""
        return self.cache[int(self.places_N[i])]


class _Shard(NamedTuple):
    pixels: np.ndarray
    size_N2: np.ndarray
    ends: np.ndarray
    """(N,): end of each image's bytes."""


@dataclass(frozen=True)
class _Shards(Dataset[Batch]):
    """A dataset that computes shards by number."""

    split: Split
    preprocess: Preprocess

    def __getitem__(self, number: int) -> Batch:
        positions = range(number * SHARD_IMAGES, min((number + 1) * SHARD_IMAGES, len(self.split)))
        images = [base_of(self.split, self.preprocess, i) for i in positions]
        pixels = np.concatenate([image.reshape(-1) for image in images])
        return {
            "pixels": torch.from_numpy(pixels),
            "size": torch.tensor([image.shape[:2] for image in images], dtype=torch.int32),
        }


class Estimate(NamedTuple):
    """Estimated size of a store of base images."""

    bytes: int
    seconds: float
    """On one core."""


def estimate(split: Split, preprocess: Preprocess, num: int = 16) -> Estimate:
    """Estimate size and time from `num` images, spread evenly over the split. Raises UserError if one cannot be read.

    The time is this thread's own on the CPU, on average, and the median of its waiting, so that the other load of a busy machine hardly
    counts and a slow disk does.
    """
    positions = sorted({i * len(split) // num for i in range(num)})
    num_bytes, cpu_s, waits_s = 0, [], []
    for i in positions:
        began, began_cpu = time.perf_counter(), time.thread_time()
        num_bytes += base_of(split, preprocess, i).nbytes
        cpu_s.append(time.thread_time() - began_cpu)
        waits_s.append(max(0.0, time.perf_counter() - began - cpu_s[-1]))
    seconds = statistics.mean(cpu_s) + statistics.median(waits_s)
    return Estimate(num_bytes * len(split) // len(positions), seconds * len(split))
