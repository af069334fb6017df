"""The analysed images of a recipe: their splits, labels, names and groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tltrain.data import DataSplits, Split
from tltrain.data.multilabel.label_sets import written

WITHOUT_TEST = ("train", "val")
"""The default: what is chosen by its features has not seen the test images."""
EVERY = ("train", "val", "test")


def samples_of(images: DataSplits, which: Iterable[str]) -> Samples:
    """which: the names of the splits that are wanted. Those that the data lacks are left out."""
    wanted = tuple(which)
    return Samples(images, tuple(s for s in (images.train, images.val, images.test) if s is not None and s.name in wanted))


@dataclass(frozen=True)
class Samples:
    """Images of some splits, one split after the other."""

    images: DataSplits
    splits: tuple[Split, ...]

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.classes

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64, or (N, K) uint8 of several labels an image, as in `Split`."""
        return np.concatenate([split.labels for split in self.splits])

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2

    @cached_property
    def label_numbers(self) -> np.ndarray:
        """(N,) int64: the class of each image, or the number of its set of labels, equal where the sets are."""
        return np.unique(self.labels, axis=0, return_inverse=True)[1].ravel() if self.several else self.labels

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """(N,) the class of each image, or its set of labels, such as cat|dog. Empty: none of them."""
        return tuple(written(self.labels, self.classes) if self.several else (self.classes[label] for label in self.labels.tolist()))

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """(N,) the images' readable names, such as paths relative to the source."""
        return tuple(name for split in self.splits for name in split.ids)

    @cached_property
    def split_names(self) -> tuple[str, ...]:
        """(N,) the split of each image."""
        return tuple(split.name for split in self.splits for _ in range(len(split)))

    @cached_property
    def numbers(self) -> np.ndarray:
        """(N,) int64, each image's number in the source: `images.source.read(number)` gives its picture."""
        return np.concatenate([split.source_index for split in self.splits])

    @cached_property
    def groups(self) -> np.ndarray:
        """(N,) int64. Images of one group belong together. Each is a group of its own where the source has no groups."""
        return self.numbers if self.images.source is None else self.images.source.groups[self._places]

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """(N,) hash of each file's bytes. Empty where the source has none."""
        known = () if self.images.source is None else self.images.source.digests
        return tuple(known[i] for i in self._places.tolist()) if known else ()

    @property
    def _places(self) -> np.ndarray:
        """(N,) int64, the position of each image in the source's arrays. Unreadable files leave gaps in its numbers, which may be in any
        order."""
        assert self.images.source is not None
        place_of = {number: i for i, number in enumerate(self.images.source.numbers.tolist())}
        return np.array([place_of[number] for number in self.numbers.tolist()], dtype=np.int64)
