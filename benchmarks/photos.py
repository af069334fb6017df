"""One epoch of views of photos, out of the image store and out of their files, and what filling the store takes."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import timing
from benchmarks.timing import Case, Contestant, Lap, Result
from tltrain.cache import disk_store
from tltrain.cache.disk_store import Store
from tltrain.cache.image_cache import ImageCache
from tltrain.core.recipe import Augment
from tltrain.data.dataset import Split
from tltrain.data.loader import train_loader
from tltrain.data.sampler import SampleStream, Shard
from tltrain.data.sources.image_list import FileReader
from tltrain.data.views import Preprocess, Views, base_of

VIEW = Preprocess(224, 256)
BATCH = 8
PHOTOS = ((3000, 2000, 16), (500, 375, 128))
"""Width, height, number: a camera's photos, and photos of the size that is usual on the web and in ImageNet."""
AUGMENTS: tuple[Augment, ...] = ("light", "strong")


def main(words: Sequence[str] | None = None) -> list[Result]:
    parser = timing.parser("photos", __doc__)
    parser.add_argument(
        "--photo", type=_photo, action="append", metavar="WIDTHxHEIGHTxNUMBER",
        help="photos to try it on, in pixels, as often as you like (default: 3000x2000x16 and 500x375x128)",
    )  # fmt: skip
    return timing.command(parser, _cases, words)


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    for width, height, num in [(400, 300, 2 * BATCH)] if given.smoke else given.photo or PHOTOS:
        with tempfile.TemporaryDirectory() as folder:
            split = photos(Path(folder), width, height, num)
            for augment in AUGMENTS[: 1 if given.smoke else None]:
                with ExitStack() as opened:
                    yield case(split, Path(folder), f"{num} photos of {width} x {height}", augment, opened)


def _photo(word: str) -> tuple[int, int, int]:
    width, height, num = (int(part) for part in word.split("x"))
    if min(width, height) < 1 or num < BATCH or num % BATCH:
        raise argparse.ArgumentTypeError(f"{word}: give the number of photos as a multiple of {BATCH}, and sides of at least 1 pixel")
    return width, height, num


def photos(folder: Path, width: int, height: int, num: int) -> Split:
    """JPEG files as a camera writes them, cut out of one picture."""
    draw, canvas = np.random.default_rng(0), _picture(width + width // 4, height + height // 4)
    paths = []
    for i in range(num):
        x, y = (int(draw.integers(side // 4 + 1)) for side in (width, height))
        photo = canvas.crop((x, y, x + width, y + height))
        paths.append(str(folder / f"{i:05d}.jpg"))
        (photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i % 2 else photo).save(paths[-1], quality=90)
    number_N = np.arange(num)
    return Split("train", number_N % 2, tuple(paths), number_N, FileReader(tuple(paths)))


def _picture(width: int, height: int) -> Image.Image:
    """Blobs of all sizes, the large ones with the most contrast, as in photos: at quality 90 about 2 bits a pixel."""
    draw, pixels_HWC = np.random.default_rng(1), np.full((height, width, 3), 128, np.float32)
    for octave in range(2, 12):
        cells = (min(height, 2**octave), min(width, 2**octave * width // height), 3)
        blobs = Image.fromarray(draw.integers(0, 256, cells, dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels_HWC += (np.asarray(blobs, np.float32) - 128) * 0.75 ** (octave - 1)
    return Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))


def case(split: Split, folder: Path, what: str, augment: Augment, opened: ExitStack) -> Case:
    """opened: keeps the store open until the case has been run."""
    store = opened.enter_context(Store(folder, "photos", {"augment": augment}, {}))
    _write(store, split)
    stored = ImageCache(store.path, split, VIEW)
    base_s, view_s = _cpu_seconds(split, augment, stored)
    times = (base_s + view_s) / view_s
    contestants = [
        Contestant("files", partial(epoch, split, augment, None, 1), "views"),
        Contestant("image store", partial(epoch, split, augment, stored, round(times)), "views"),
        Contestant("filling the store", partial(fill, split, folder), "bases"),
    ]
    photo_kb, base_kb = (
        sum(path.stat().st_size for path in f) / len(split) / 1e3 for f in (map(Path, split.ids), store.list_shards().values())
    )
    return Case(
        title=f"{what}, augment {augment}",
        contestants=contestants,
        measure="speed",
        tolerance=0,
        bound=f"{base_s * 1e3:.1f} ms of a core to read, decode and resize a photo, {view_s * 1e3:.1f} ms to take a view of it: "
        f"{times:.1f} times; a photo is {photo_kb:,.0f} kB, its base image {base_kb:,.0f} kB",
    )


def epoch(split: Split, augment: Augment, stored: ImageCache | None, times: int) -> Lap:
    """Every photo once, in batches, by this process, which starts with none in its memory: so it is with more photos than that holds.

    times: how often it is done over; a lap is as long as the others' then, and whatever else the machine does slows all alike.
    """
    stream, seconds = SampleStream(0, 0, len(split), BATCH, None, 0), 0.0
    for _ in range(times):
        views = Views(split, VIEW, augment, flip=True, seed=0, bases=stored)
        check, total, began = 0, 0, time.perf_counter()
        for batch in train_loader(views, stream, 0, len(split) // BATCH, Shard(), 0, pin=False):
            pixels = batch["image"].numpy()
            check, total = zlib.adler32(pixels.data, check), total + int(pixels[..., 0].sum())
        seconds += time.perf_counter() - began
    return Lap(seconds / times, (float(check), total / len(split) / 3 / VIEW.size / 255))


def fill(split: Split, folder: Path) -> Lap:
    """Files to a new store, each shard on the disk."""
    began = time.perf_counter()
    with Store(folder, "photos", {"filled": time.time_ns()}, {}) as store:
        _write(store, split)
    seconds = time.perf_counter() - began
    mean = np.mean([float(disk_store.read(file)["pixels"].float().mean()) for file in store.list_shards().values()])
    shutil.rmtree(store.path)
    return Lap(seconds, (float(mean) / 255,))


def _write(store: Store, split: Split) -> None:
    made = ImageCache(store.path, split, VIEW)
    for name, tensors in made.make(made.names()):
        store.write(name, tensors)


def _cpu_seconds(split: Split, augment: Augment, stored: ImageCache) -> tuple[float, float]:
    """Seconds of a core: to make a photo's base image, and to take a view of it. Means over a few photos."""
    num, views = min(16, len(split)), Views(split, VIEW, augment, flip=True, seed=0, bases=stored)
    began = time.process_time()
    for i in range(num):
        base_of(split, VIEW, i)
    between = time.process_time()
    for v in range(1, 9):
        for i in range(num):
            views.view(i, v)
    return (between - began) / num, (time.process_time() - between) / num / 8


if __name__ == "__main__":
    main()
