"""Facts about a data set that the choice of a recipe depends on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, Split, class_counts
from tltrain.runs.report.stats import wilson

FEW_TESTED = 50
"""Test images below which an accuracy says little."""
LOOKED_AT = 24
"""Pictures whose size is looked at."""
UNEVEN = 3.0
"""Times that the largest class may be larger than the smallest before it is tried to balance them."""


@dataclass(frozen=True)
class Facts:
    """Sizes of a data set."""

    source: str
    num_classes: int
    train: int
    val: int
    test: int
    smallest: str
    """The class with the fewest training images."""
    smallest_n: int
    largest: str
    largest_n: int
    side: int
    """The median of the pictures' shorter sides, pixels."""
    cuts_val: bool = False
    """Whether val was cut from train. False: the source declares it, or there is none."""
    label_separator: str | None = None
    """As data.label_separator: an image may have several labels, which are counted as the classes are."""
    label_columns: Sequence[str] | None = None
    """As data.label_columns."""

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.label_separator is not None or self.label_columns is not None

    @property
    def ratio(self) -> float:
        """Training images of the largest class for each of the smallest."""
        return self.largest_n / max(1, self.smallest_n)

    def line(self) -> str:
        """The facts as a line for the user."""
        splits = f"{self.train:,} to train on, {self.val:,} val, {self.test:,} test"
        each = f"{self.smallest_n:,}" if self.smallest_n == self.largest_n else f"{self.smallest_n:,} to {self.largest_n:,}"
        return f"{splits}; {self.num_classes} {'labels' if self.several else 'classes'} of {each} images; {self.side} px"

    def notes(self) -> list[str]:
        """Notes on data that is too small."""
        if not self.test:
            return ["there is no test split, so that nothing judges the network; tltrain folds judges it on all images"]
        if self.test < FEW_TESTED:
            low, high = wilson(0.9, self.test)
            found = f"90 % right of {self.test} test images may be {100 * low:.0f} to {100 * high:.0f} %"
            return [f"{found}; tltrain folds judges a recipe on all images"]
        return []


def facts_of(data: Data, images: DataSplits) -> Facts:
    """data: what the images were opened from. Raises UserError for data with a single class."""
    if len(images.classes) < 2 and not data.multilabel:
        told = f"{data.source} has one class, {images.classes[0]}"
        raise UserError(f"{told}, and a network learns to tell classes apart; give two or more")
    count_K = class_counts(images.train.labels, len(images.classes)).tolist()
    least, most = (pick(range(len(count_K)), key=count_K.__getitem__) for pick in (min, max))
    num_val, num_test = (0 if split is None else len(split) for split in (images.val, images.test))
    return Facts(
        data.source, len(images.classes), len(images.train), num_val, num_test,
        images.classes[least], count_K[least], images.classes[most], count_K[most], _side(images.train),
        images.val is not None and images.source is not None and "val" not in images.source.declared,
        data.label_separator, data.label_columns,
    )  # fmt: skip


def _side(split: Split) -> int:
    places = [i * len(split) // LOOKED_AT for i in range(LOOKED_AT)]
    return int(statistics.median(min(split.read(i).size) for i in dict.fromkeys(places)))
