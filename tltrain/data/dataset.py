"""What a data set is once it is open: classes, splits, and how to read one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tltrain.core.recipe import Data

Read = Callable[[int], Image.Image]


@dataclass(frozen=True)
class Split:
    """The samples of train, val or test. A position counts within the split, from 0 to N - 1."""

    name: str
    labels: np.ndarray
    """(N,) int64, the class of each sample."""
    ids: tuple[str, ...]
    """What a person calls each sample: a path below the source, or digits/17."""
    index: np.ndarray
    """(N,) int64, each sample's number in the source; its views are seeded by it, so that they survive another split."""
    read: Read
    """The image at a position, RGB. It can be pickled."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSplits:
    """An open data set. The class list is one for all splits."""

    classes: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split | None
    fingerprint: str
    """Hash of the class names, of every sample's bytes and label, and of who is in which split."""
    notes: tuple[str, ...] = ()
    """Lines a person should see."""
    in_memory: bool = False
    """Whether reading an image takes no decoding worth a data worker."""
    source: Source | None = None
    """What was split, with the samples that no split has; None where it was never whole."""


@dataclass(frozen=True)
class Source:
    """Every readable sample of a source, before it is split."""

    classes: tuple[str, ...]
    labels: np.ndarray
    """(N,) int64."""
    ids: tuple[str, ...]
    numbers: np.ndarray
    """(N,) int64, what `read` takes; they have gaps where a file is unreadable."""
    declared: np.ndarray
    """(N,) str, the split that the source itself puts a sample in: train, val or test. A split that is nowhere is cut out of train."""
    groups: np.ndarray
    """(N,) int64; samples of one group stay together when train is cut."""
    read: Read
    """The image with a number, RGB. It can be pickled."""
    fingerprint: str
    """Hash of classes, ids, labels and contents."""
    digests: tuple[str, ...] = ()
    """(N,) hash of each file's bytes, or empty: then byte-identical images are not looked for."""
    notes: tuple[str, ...] = ()
    in_memory: bool = False
    """Whether reading an image takes no decoding worth a data worker."""


Opener = Callable[[str | None, Data, Path], Source]
"""(what stands behind the colon, or None; the recipe's data; the folder of downloads) -> every readable sample. Raises UserError."""


@dataclass(frozen=True)
class SourceKind:
    """One thing that data.source can be. It is registered by name (tltrain/registry.py, kind sources)."""

    open: Opener
    argument: str = ""
    """What a message calls the part behind the colon, such as PATH; empty: the source is a name alone."""
    outline: Callable[[str | None, Data, Path], Source | None] | None = None
    """For a plan: what is known of a data set before it is downloaded; None where it is there."""


@dataclass(frozen=True)
class Indexed:
    """`read` by position in a split."""

    read: Read
    numbers: np.ndarray

    def __call__(self, position: int) -> Image.Image:
        return self.read(int(self.numbers[position]))


def class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Weights (num_classes,) inverse to class frequency: n / (K n_c), 1 on average over the samples; 0 for a class that has none.

    K counts the classes that have samples.
    """
    count_K = np.bincount(labels, minlength=num_classes)
    present = count_K > 0
    weight_K = np.zeros(num_classes)
    weight_K[present] = len(labels) / (present.sum() * count_K[present])
    return weight_K
