"""Small sets in torchvision's own forms on the disk: idx files, folders of classes, lists of files, tables, files of HDF5."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from container_files import Row, digit_rows
from PIL import Image


def _of(rows: Sequence[Row], split: str) -> list[Row]:
    return [row for row in rows if row.split == split]


def _put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def grey_digits(rows: Sequence[Row]) -> list[tuple[np.ndarray, int]]:
    """Grey digits of 28 x 28 pixels with their labels."""
    return [(np.asarray(Image.open(io.BytesIO(row.content)).convert("L").resize((28, 28))), row.label) for row in rows]


def mnist(root: Path, rows: Sequence[Row]) -> None:
    """train and test. The classes are torchvision's own, which are ten."""
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels, labels = zip(*grey_digits(_of(rows, split)), strict=True)
        head = len(pixels).to_bytes(4, "big")
        image_head = b"\0\0\x08\x03" + head + (28).to_bytes(4, "big") * 2
        _put(root / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", image_head + np.stack(pixels).tobytes())
        _put(root / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", b"\0\0\x08\x01" + head + bytes(labels))


def dtd(root: Path, rows: Sequence[Row]) -> None:
    """train, val and test by lists of files."""
    for split in ("train", "val", "test"):
        names = [f"kind {row.label}/{split}_{i}.jpg" for i, row in enumerate(_of(rows, split))]
        for name, row in zip(names, _of(rows, split), strict=True):
            _put(root / "dtd" / "dtd" / "images" / name, row.content)
        _put(root / "dtd" / "dtd" / "labels" / f"{split}1.txt", "\n".join(names) + "\n")


def pets(root: Path, rows: Sequence[Row]) -> None:
    """train and test by lists, which name the classes and number them from 1."""
    for split, listing in (("train", "trainval"), ("test", "test")):
        names = [f"kind_{row.label}_{listing}{i}" for i, row in enumerate(_of(rows, split))]
        for name, row in zip(names, _of(rows, split), strict=True):
            _put(root / "oxford-iiit-pet" / "images" / f"{name}.jpg", row.content)
        lines = [f"{name} {row.label + 1} 1 1\n" for name, row in zip(names, _of(rows, split), strict=True)]
        _put(root / "oxford-iiit-pet" / "annotations" / f"{listing}.txt", "".join(lines))


def aircraft(root: Path, rows: Sequence[Row]) -> None:
    """train, val and test by lists of images with the names of their classes."""
    data = root / "fgvc-aircraft-2013b" / "data"
    _put(data / "variants.txt", "".join(f"kind {label}\n" for label in sorted({row.label for row in rows})))
    for split in ("train", "val", "test"):
        for i, row in enumerate(_of(rows, split)):
            _put(data / "images" / f"{split}{i}.jpg", row.content)
        lines = [f"{split}{i} kind {row.label}\n" for i, row in enumerate(_of(rows, split))]
        _put(data / f"images_variant_{split}.txt", "".join(lines))


def country211(root: Path, rows: Sequence[Row]) -> None:
    """train, val and test by folders."""
    for i, row in enumerate(rows):
        _put(root / "country211" / {"val": "valid"}.get(row.split, row.split) / f"C{row.label}" / f"{i}.jpg", row.content)


def eurosat(root: Path, rows: Sequence[Row]) -> None:
    """Folders of classes, without splits: the images of train alone."""
    for i, row in enumerate(_of(rows, "train")):
        _put(root / "eurosat" / "2750" / f"Land{row.label}" / f"{i}.jpg", row.content)


def gtsrb(root: Path, rows: Sequence[Row]) -> None:
    """train by folders, test by a table."""
    for i, row in enumerate(_of(rows, "train")):
        _put(root / "gtsrb" / "GTSRB" / "Training" / f"{row.label:05d}" / f"{i}.ppm", row.content)
    lines = ["Filename;Width;Height;ClassId\n"]
    for i, row in enumerate(_of(rows, "test")):
        _put(root / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / f"{i:05d}.ppm", row.content)
        lines.append(f"{i:05d}.ppm;48;40;{row.label}\n")
    _put(root / "gtsrb" / "GT-final_test.csv", "".join(lines))


def pcam(root: Path, rows: Sequence[Row]) -> None:
    """train, val and test of the classes 0 and 1, in files of HDF5. Skips the test without h5py."""
    h5py = pytest.importorskip("h5py")
    (root / "pcam").mkdir(parents=True)
    for split, word in (("train", "train"), ("val", "valid"), ("test", "test")):
        kept = [row for row in _of(rows, split) if row.label < 2]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(row.content)).convert("RGB")) for row in kept])
        labels = np.array([row.label for row in kept])[:, None, None, None]
        for kind, values in (("x", pixels), ("y", labels)):
            with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_{word}_{kind}.h5", "w") as file:
                file.create_dataset(kind, data=values.astype(np.uint8), compression="gzip")


PUBLISHED: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    "MNIST": mnist, "DTD": dtd, "OxfordIIITPet": pets, "FGVCAircraft": aircraft, "Country211": country211, "EuroSAT": eurosat,
    "GTSRB": gtsrb, "PCAM": pcam,
}  # fmt: skip
"""torchvision's name to what writes rows into the folder of downloads."""


def published(name: str, root: Path) -> str:
    """data.source of a set in the folder of downloads `root`."""
    PUBLISHED[name](root, digit_rows(10 if name == "MNIST" else 3))
    return f"torchvision:{name}"
