"""Small pictures in every form in which people keep photos, and a store of their base images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tltrain.cache import image_cache
from tltrain.cache.disk_store import Store
from tltrain.cache.image_cache import ImageCache
from tltrain.data import DataSplits, Split
from tltrain.data.views import Preprocess

NUM, VIEW = 75, Preprocess(32, 36)


def scene(width: int, height: int, seed: int) -> np.ndarray:
    """uint8 (height, width, 3): smooth colours with a sharp block in them."""
    draw = np.random.default_rng(seed)
    phase, speed = draw.uniform(0, 6, 3), draw.uniform(0.02, 0.2, (2, 3))
    y_HW, x_HW = np.mgrid[:height, :width]
    wave_HWC = np.sin(phase + y_HW[..., None] * speed[0] + x_HW[..., None] * speed[1])
    pixels_HWC = (127 + 120 * wave_HWC).astype(np.uint8)
    pixels_HWC[height // 4 : height // 2, width // 3 : width // 2] = draw.integers(0, 256, 3)
    return pixels_HWC


def _turned(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path.with_suffix(".jpg"), quality=90, exif=exif)


def _transparent(image: Image.Image, path: Path) -> None:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(path.with_suffix(".png"))


def _sixteen_bits(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path.with_suffix(".png"))


KINDS: list[Callable[[Image.Image, Path], None]] = [
    lambda image, path: image.save(path.with_suffix(".jpg"), quality=90),
    _turned,
    _transparent,
    _sixteen_bits,
    lambda image, path: image.convert("L").save(path.with_suffix(".png")),
    lambda image, path: image.quantize(16).save(path.with_suffix(".png"), transparency=3),
    lambda image, path: image.convert("CMYK").save(path.with_suffix(".jpg"), quality=90),
]
SIZES = [(60, 44), (44, 60), (36, 36), (400, 40), (50, 36), (37, 90), (24, 30)]


def photo_folder(root: Path) -> Path:
    """Two classes of NUM files together."""
    for name in "ab":
        (root / name).mkdir()
    for i in range(NUM):
        size = SIZES[i // len(KINDS) % len(SIZES)]
        KINDS[i % len(KINDS)](Image.fromarray(scene(*size, seed=i)), root / "ab"[i % 2] / f"{i:03d}")
    return root


def open_store(root: Path, images: DataSplits) -> Store:
    return Store(root, image_cache.KIND, image_cache.key(images.fingerprint, "train", VIEW), {})


def filled(store: Store, split: Split, workers: int = 0) -> ImageCache:
    made = ImageCache(store.path, split, VIEW)
    for name, tensors in made.make(made.names(), workers):
        store.write(name, tensors)
    return made


def contents(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.list_shards().values()}
