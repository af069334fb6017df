"""Data types of an open data set: Source (all samples), Split (train, val or test), DataSplits (all three)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data.tables.corrections import corrected
from tltrain.data.tables.texts import Texts

Read = Callable[[int], Image.Image]


@dataclass(frozen=True)
class Split:
    """The samples of train, val or test. A position is a place in the split, from 0 to N - 1."""

    name: str
    labels: np.ndarray
    """(N,) int64, the class of each sample. Of several labels (`Data.multilabel`): (N, K) uint8, 1 where a sample has a class."""
    ids: Sequence[str]
    """(N,) readable name of each sample: a path relative to the source, or digits/17. `Texts` keeps a million in one buffer."""
    source_index: np.ndarray
    """(N,) int64, each sample's number in the source. It seeds the sample's views, so they do not depend on the split."""
    read: Read
    """Reads the RGB image at a position. Picklable."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class SharedImages:
    """The images that the folds of a recipe have between them, in whichever split: a store of all of them serves every fold."""

    split: Split
    """Named `all`."""
    fingerprint: str
    """Hash of these images. It does not depend on the fold."""

    def positions(self, part: Split) -> np.ndarray:
        """(N,) int64: the position of each sample of a split among all."""
        order = np.argsort(self.split.source_index)
        return order[np.searchsorted(self.split.source_index[order], part.source_index)]


NO_LABEL = -1
BEHIND = 1 << 40
"""Added to the numbers of pictures without labels, so that their views are drawn apart from those of train."""


@dataclass(frozen=True)
class Unlabelled:
    """Pictures without labels, of a source of their own."""

    named: str
    """The source, as the recipe names it."""
    split: Split
    """Every label is NO_LABEL."""
    fingerprint: str
    digests: Sequence[str] = ()
    """(N,) as in `Source`."""
    in_memory: bool = False
    notes: tuple[str, ...] = ()
    excluded: frozenset[str] = frozenset()
    """Of what data.exclude leaves out: the hashes of the files and, where both are one source, the ids."""


@dataclass(frozen=True)
class OneOfTwo:
    """Reads by position in one split, and behind it in another."""

    first: Read
    second: Read
    num_first: int

    def __call__(self, position: int) -> Image.Image:
        return self.first(position) if position < self.num_first else self.second(position - self.num_first)


@dataclass(frozen=True)
class DataSplits:
    """An open data set. All splits share one class list."""

    classes: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split | None
    fingerprint: str
    """Hash of the class names, every sample's bytes and label, and the members of each split."""
    notes: tuple[str, ...] = ()
    """Messages for the user."""
    in_memory: bool = False
    """Whether images are so cheap to read that data workers would not help."""
    source: Source | None = None
    """The source before the split, including samples that belong to no split. None where it is not available."""
    shared: SharedImages | None = None
    """The images that stores share between folds. None without folds: each split has its own store."""
    unlabelled: Unlabelled | None = None
    """Pictures that a student learns its teacher's answers of, beside train. None: there are none."""

    @cached_property
    def pool(self) -> Split:
        """The split that training samples are drawn from: train, followed by the pictures without labels."""
        if self.unlabelled is None:
            return self.train
        own, other = self.train, self.unlabelled.split
        ids, labels = Texts.of(chain(own.ids, other.ids)), np.concatenate([own.labels, other.labels])
        source_index = np.concatenate([own.source_index, BEHIND + other.source_index])
        return Split("pool", labels, ids, source_index, OneOfTwo(own.read, other.read, len(own)))

    def drawn(self, taught: bool) -> Split:
        """What a stage draws from. taught: it learns from a teacher, who needs no labels."""
        return self.pool if taught else self.train

    def fingerprint_of(self, split: Split) -> str:
        """Hash of what decides the views of a split: that of the data set, of folds together, or of the pool."""
        if self.shared is not None and split is self.shared.split:
            return self.shared.fingerprint
        if self.unlabelled is not None and split is self.pool:
            return hashlib.blake2b((self.fingerprint + self.unlabelled.fingerprint).encode(), digest_size=16).hexdigest()
        return self.fingerprint


@dataclass(frozen=True)
class Source:
    """All readable samples of a data source, before they are split."""

    classes: tuple[str, ...]
    labels: np.ndarray
    """(N,) int64, or (N, K) uint8, as in `Split`."""
    ids: Sequence[str]
    """(N,) readable names. A tuple does; of a million images let it be `Texts.of(names)` (tltrain/data/tables/texts.py)."""
    numbers: np.ndarray
    """(N,) int64, the argument of `read` for each sample. Unreadable files leave gaps."""
    declared: np.ndarray
    """(N,) str, the split that the source declares for each sample: train, val or test. A split without samples is cut from train."""
    groups: np.ndarray
    """(N,) int64. Samples of one group stay together when a split is cut from train."""
    read: Read
    """Reads the RGB image with a number. Picklable."""
    fingerprint: str
    """Hash of classes, ids, labels and contents."""
    digests: Sequence[str] = ()
    """(N,) hash of each file's bytes, or of parts of them where it begins with `~`. Empty: identical images are not searched for."""
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    """Those of the notes that name images which cannot be read."""
    in_memory: bool = False
    """Whether images are so cheap to read that data workers would not help."""
    corrected: bool = False
    """Whether data.exclude and data.relabel were applied when the source was opened. If not, they are applied before the split."""


Opener = Callable[[str | None, Data, Path], Source]
"""(the part of data.source after the colon, or None; the recipe's data; the download folder) -> Source. Raises UserError."""


@dataclass(frozen=True)
class SourceKind:
    """One kind of data source, registered by name (tltrain/core/registry.py, kind sources)."""

    open: Opener
    argument: str = ""
    """Name of the part after the colon in messages, such as PATH. Empty: the source has no such part."""
    multilabel: bool = False
    """Whether it reads several labels an image (data.label_separator, data.label_columns)."""
    columns: bool = False
    """Whether it reads tables whose columns data.image_column and data.label_column name."""
    tree: bool = False
    """Whether its classes are folders, of which data.depth says how many levels count."""
    outline: Callable[[str | None, Data, Path], Source | None] | None = None
    """For `tltrain plan`: returns a Source with the known sizes of a data set that is not downloaded yet, or None if it is there."""

    def foreign(self) -> dict[str, None]:
        """Data settings that belong to other kinds of sources, with their defaults."""
        return dict.fromkeys((*(() if self.columns else ("image_column", "label_column")), *(() if self.tree else ("depth",))))

    def check(self, spec: Data) -> None:
        """Raise UserError if the recipe says what this kind does not know."""
        if not self.columns and (spec.image_column or spec.label_column):
            raise UserError(
                "data.image_column and data.label_column are of tables of Parquet and Hugging Face (parquet:, hf:), and data.source is "
                f"{spec.source}; leave them out{': a CSV file calls its columns path and label' if spec.source.startswith('csv:') else ''}"
            )
        if not self.tree and spec.depth is not None:
            raise UserError(f"data.depth is of folders (folder:, zip:, tar:, lmdb:), and data.source is {spec.source}; leave it out")


@dataclass(frozen=True)
class Indexed:
    """Reads by position in a split, given a reader by number in the source."""

    read: Read
    numbers: np.ndarray

    def __call__(self, position: int) -> Image.Image:
        return self.read(int(self.numbers[position]))


def corrected_source(source: Source, spec: Data) -> Source:
    """The source with data.exclude and data.relabel applied, if they were not when it was opened. Raises UserError as `corrected`."""
    if source.corrected or (spec.exclude is None and spec.relabel is None):
        return source
    changed = corrected(spec, source.ids, [source.classes[label] for label in source.labels.tolist()])
    number_of = {name: k for k, name in enumerate(source.classes)}
    kept_N = np.array(changed.kept, dtype=np.int64)
    label_N = np.array([number_of[label] for label in changed.labels], dtype=np.int64)
    numbers_N = source.numbers[kept_N]
    content = source.fingerprint.encode() + numbers_N.astype("<i8").tobytes() + label_N.astype("<i8").tobytes()
    return replace(
        source, labels=label_N, ids=Texts.of(source.ids[i] for i in changed.kept), numbers=numbers_N, declared=source.declared[kept_N],
        groups=source.groups[kept_N], digests=Texts.of(source.digests[i] for i in changed.kept) if source.digests else (),
        fingerprint=hashlib.blake2b(content, digest_size=16).hexdigest(), notes=(*source.notes, *changed.notes), corrected=True,
    )  # fmt: skip


def sampling_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each sample (N,) is drawn, so that classes are drawn equally often. A picture without a label: as the mean image."""
    known = labels != NO_LABEL
    weight_N = np.ones(len(labels))
    weight_N[known] = class_weights(labels[known], num_classes)[labels[known]]
    return weight_N


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(num_classes,) int64: the samples of each class. labels: as in `Split`."""
    return labels.sum(0, dtype=np.int64) if labels.ndim == 2 else np.bincount(labels, minlength=num_classes)


def class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Loss weights (num_classes,) inverse to class frequency: n / (K n_c). Their mean over the samples is 1.

    K is the number of classes that have samples. A class without samples has weight 0.
    """
    count_K = np.bincount(labels, minlength=num_classes)
    present = count_K > 0
    weight_K = np.zeros(num_classes)
    weight_K[present] = len(labels) / (present.sum() * count_K[present])
    return weight_K


def label_weights(labels: np.ndarray) -> np.ndarray:
    """Loss weights (2, K) of several labels (N, K): of samples without each class, and of those with it.

    Each class is two, with and without it, that are weighed as `class_weights` does: their sums over the samples are equal.
    """
    return np.stack([class_weights(label_N, 2) for label_N in labels.T], axis=1)


ALONE = 0.95
"""Groups for each image from which images count as drawn one by one: a few copies move no interval by much."""


def groups_in(images: DataSplits, split: Split | None) -> np.ndarray | None:
    """(N,) int64, the group of each image of a split. None where nearly each image is a group, and where the groups are not known."""
    if split is None or images.source is None:
        return None
    order = np.argsort(images.source.numbers)
    group_N: np.ndarray = images.source.groups[order[np.searchsorted(images.source.numbers[order], split.source_index)]]
    return group_N if len(np.unique(group_N)) < ALONE * len(split) else None
