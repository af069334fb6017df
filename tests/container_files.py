"""scikit-learn's digits as rows of (split, class, PNG): what the tests of containers put into each format by that format's own library."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from digit_files import SPLITS, digit_image
from sklearn.datasets import load_digits

from tltrain.core.recipe import Data
from tltrain.data import DataSplits, Split, open_images


class Row(NamedTuple):
    """One image."""

    split: str
    label: int
    content: bytes
    """A PNG file."""


@cache
def digit_rows(num_classes: int = 3) -> tuple[Row, ...]:
    """8 images of train, 3 of val and 4 of test for each class."""
    rows = []
    for split, part in SPLITS.items():
        for label in range(num_classes):
            for n in np.flatnonzero(load_digits().target == label)[part]:
                file = io.BytesIO()
                digit_image(int(n)).save(file, "PNG")
                rows.append(Row(split, label, file.getvalue()))
    return tuple(rows)


def zip_bytes(num_classes: int = 3) -> bytes:
    """A zip archive of the rows in folders of split and class."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i, row in enumerate(digit_rows(num_classes)):
            archive.writestr(f"{row.split}/digit {row.label}/{i:03}.png", row.content)
    return file.getvalue()


def tar_file(file: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar archive by tarfile, of names and their bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def opened(source: str, **options: object) -> DataSplits:
    """The images of a source."""
    return open_images(Data.model_validate({"source": source, **options}))


def looks(split: Split | None) -> list[tuple[int, bytes]]:
    """(class, pixels) of each image, sorted: two splits with the same images are equal, in whatever order."""
    assert split is not None
    return sorted((int(split.labels[i]), np.asarray(split.read(i)).tobytes()) for i in range(len(split)))


def expected(split: str, num_classes: int = 3) -> list[tuple[int, bytes]]:
    """What `looks` gives for the digits of a split."""
    from PIL import Image

    rows = [row for row in digit_rows(num_classes) if row.split == split]
    return sorted((row.label, np.asarray(Image.open(io.BytesIO(row.content)).convert("RGB")).tobytes()) for row in rows)
