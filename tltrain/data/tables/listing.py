"""The images of a source before any is read, as columns: a million of them are a few arrays, not a million objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from tltrain.data.tables.texts import Texts


class Listed(NamedTuple):
    """One image file with its id, split, label and group, as listed by a folder or a table."""

    path: Path
    id: str
    split: str
    label: str
    group: str = ""
    """Samples of one group stay in one split. Empty: byte-identical images form a group."""


class Names:
    """Numbers for names, in order of first appearance. Grows."""

    def __init__(self) -> None:
        self.number_of: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        return self.number_of.setdefault(name, len(self.number_of))

    def __iter__(self) -> Iterator[str]:
        return iter(self.number_of)


@dataclass(frozen=True, eq=False)
class Listing(Sequence[Listed]):
    """N listed images. It is also a sequence of `Listed`, made one at a time."""

    paths: Texts
    ids: Texts
    split_N: np.ndarray
    """(N,) int64, the number of each image's split among `splits`."""
    splits: tuple[str, ...]
    label_N: np.ndarray
    """(N,) int64, the number of each image's label among `labels`."""
    labels: tuple[str, ...]
    groups: Texts | None = None
    """(N,) group of each image, or empty. None: no image has a group."""

    @classmethod
    def of(cls, listed: Iterable[Listed]) -> Listing:
        if isinstance(listed, Listing):
            return listed
        images, split, label = list(listed), Names(), Names()
        split_N = np.array([split(image.split) for image in images], dtype=np.int64)
        label_N = np.array([label(image.label) for image in images], dtype=np.int64)
        groups = Texts.of(image.group for image in images) if any(image.group for image in images) else None
        paths, ids = Texts.of(str(image.path) for image in images), Texts.of(image.id for image in images)
        return cls(paths, ids, split_N, tuple(split), label_N, tuple(label), groups)

    def take(self, positions: np.ndarray) -> Listing:
        """The images at these positions (M,) int64."""
        groups = None if self.groups is None else self.groups.take(positions)
        ids = self.ids.take(positions)
        same = self.paths.data is self.ids.data  # of a folder: the paths are the ids behind its name
        paths = ids.with_prefix(self.paths.prefix) if same else self.paths.take(positions)
        return replace(self, paths=paths, ids=ids, split_N=self.split_N[positions], label_N=self.label_N[positions], groups=groups)

    def with_labels(self, labels: Sequence[str]) -> Listing:
        """The same images with other labels (N,)."""
        label = Names()
        label_N = np.array([label(name) for name in labels], dtype=np.int64)
        return replace(self, label_N=label_N, labels=tuple(label))

    def label_names(self) -> list[str]:
        """(N,) the label of each image."""
        return [self.labels[k] for k in self.label_N.tolist()]

    def split_names(self) -> list[str]:
        """(N,) the split of each image."""
        return [self.splits[k] for k in self.split_N.tolist()]

    def __len__(self) -> int:
        return len(self.label_N)

    @overload
    def __getitem__(self, place: int) -> Listed: ...
    @overload
    def __getitem__(self, place: slice) -> Listing: ...
    def __getitem__(self, place: int | slice) -> Listed | Listing:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        split, label = self.splits[self.split_N[place]], self.labels[self.label_N[place]]
        return Listed(Path(self.paths[place]), self.ids[place], split, label, "" if self.groups is None else self.groups[place])
