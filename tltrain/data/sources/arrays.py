"""Data sets in the form of arrays: scikit-learn's digits, and CIFAR-10 and CIFAR-100 from torchvision."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.paths import cache_root, writable
from tltrain.data.dataset import Source, SourceKind


@dataclass(frozen=True)
class ArrayReader:
    """Reads images from an array in memory. Pickled by value."""

    pixels_NHW: np.ndarray

    def __call__(self, number: int) -> Image.Image:
        return Image.fromarray(self.pixels_NHW[number]).convert("RGB")


@dataclass(frozen=True)
class MappedReader:
    """Reads images from a memory-mapped .npy file (N, H, W, 3), which all processes of a machine share. Pickled as a path."""

    file: Path

    def __call__(self, number: int) -> Image.Image:
        return Image.fromarray(_mapped(self.file)[number])


def open_digits() -> Source:
    """1797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998), as scikit-learn ships them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels_N = digits.target.astype(np.int64)
    content = hashlib.blake2b(pixels_NHW.tobytes() + labels_N.tobytes(), digest_size=16).hexdigest()
    return from_arrays("digits", tuple("0123456789"), labels_N, ["train"] * len(labels_N), ArrayReader(pixels_NHW), content)


def open_cifar(name: str, root: Path) -> Source:
    """cifar10 or cifar100 in `root`, downloaded if absent. Raises UserError if the download fails."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    train, test = _downloaded(kind, root)
    labels_N = np.array([*train.targets, *test.targets], dtype=np.int64)
    content = hashlib.blake2b(repr([*kind.train_list, *kind.test_list]).encode(), digest_size=16).hexdigest()
    file = cache_root() / f"{name}-{content}.npy"
    if not file.exists():
        with files.replacing(file) as temporary, temporary.open("wb") as opened:  # np.save adds a suffix to a path, but not to a file
            np.save(opened, np.concatenate([train.data, test.data]))
    declared = ["train"] * len(train) + ["test"] * len(test)
    return from_arrays(name, tuple(train.classes), labels_N, declared, MappedReader(file), content)


def outline_cifar(name: str, root: Path) -> Source | None:
    """The known sizes of cifar10 or cifar100 before the download, for `tltrain plan`. None if it is there.

    The images of this source cannot be read. Its class names are numbers.
    """
    from torchvision import datasets

    kind, num_classes = {"cifar10": (datasets.CIFAR10, 10), "cifar100": (datasets.CIFAR100, 100)}[name]
    if (root / kind.base_folder).exists() or (root / kind.filename).exists():
        return None
    labels_N = np.arange(60_000, dtype=np.int64) % num_classes  # both are balanced, 50,000 to train and 10,000 to test
    declared = ["train"] * 50_000 + ["test"] * 10_000
    source = from_arrays(name, tuple(str(k) for k in range(num_classes)), labels_N, declared, ArrayReader(np.empty(0)), "outline")
    note = f"{name} is not in {root} yet: planned with its published numbers, and downloaded when training starts"
    return replace(source, notes=(note,))


def from_arrays(
    name: str, classes: tuple[str, ...], labels_N: np.ndarray, declared: list[str], read: ArrayReader | MappedReader, content: str
) -> Source:
    """A source in which every sample is readable and its own group. content: hash of pixels and labels."""
    numbers_N = np.arange(len(labels_N), dtype=np.int64)
    ids = tuple(f"{name}/{i}" for i in numbers_N)
    return Source(classes, labels_N, ids, numbers_N, np.array(declared), numbers_N, read, f"{name}-{content}", in_memory=True)


def _downloaded(kind: Any, root: Path) -> tuple[Any, Any]:
    """torchvision's train and test set, downloaded if needed. torchvision checks the md5 of every file."""
    try:
        return kind(root, train=True), kind(root, train=False)
    except RuntimeError:  # torchvision raises this for absent and for damaged files
        writable(root, "TLTRAIN_DATA")
    try:
        with files.downloading(root / f".{kind.filename}.lock", f"downloads {kind.filename}"):  # one process downloads, the others wait
            return kind(root, train=True, download=True), kind(root, train=False)
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{kind.__name__} is not in {root} and cannot be downloaded ({error}); put {kind.filename} (md5 {kind.tgz_md5}, from "
            f"{kind.url}) into that folder, or set TLTRAIN_DATA to the folder that holds it"
        ) from error


@lru_cache(maxsize=4)
def _mapped(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r")


def _cifar(name: str) -> SourceKind:
    return SourceKind(lambda argument, spec, root: open_cifar(name, root), outline=lambda argument, spec, root: outline_cifar(name, root))


DIGITS = SourceKind(lambda argument, spec, root: open_digits())
CIFAR10 = _cifar("cifar10")
CIFAR100 = _cifar("cifar100")
