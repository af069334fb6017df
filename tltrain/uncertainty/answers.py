"""A network's predictions on val, reduced to what sets and thresholds are fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tltrain.core.errors import UserError


@dataclass(frozen=True)
class Answers:
    """One entry for each image. All probabilities are calibrated."""

    confidence: np.ndarray
    """(N,) float64, the probability of the most probable class."""
    own: np.ndarray
    """(N,) float64, the probability of the image's own class."""
    right: np.ndarray
    """(N,) bool, whether the most probable class is the image's own."""
    num_groups: int | None = None
    """Groups of images that are alike, such as frames of one film. None: each image is drawn by itself, or it is not known."""

    def __len__(self) -> int:
        return len(self.own)

    @property
    def worth(self) -> int:
        """Effective number of images: that of groups, if images of a group are alike."""
        return len(self) if self.num_groups is None else self.num_groups


@dataclass(frozen=True)
class Val:
    """The size of val."""

    n: int
    """Images."""
    groups: int | None = None
    """As `Answers.num_groups`."""

    @property
    def worth(self) -> int:
        """As `Answers.worth`."""
        return self.n if self.groups is None else self.groups

    def __str__(self) -> str:
        in_groups = "" if self.groups is None else f" in {self.groups:,} group{'s' * (self.groups != 1)}"
        return f"val has {self.n:,} image{'s' * (self.n != 1)}{in_groups}"


GROUPED = (
    "the images of val lie in {:,} groups of images that are alike. What is said of its luck, and with 95 % confidence, is for images "
    "drawn one by one, and does not hold here: think of val as of so many images"
)
"""To be formatted with the number of groups."""


def share(name: str, value: float) -> float:
    """The value, if it is a share between 0 and 1, both left out. Raises UserError."""
    if not 0 < value < 1:
        per_cent = f"; did you mean {value / 100:g}?" if 1 < value < 100 else ""
        raise UserError(f"{name} is {value:g}; it must be between 0 and 1, such as 0.9{per_cent}")
    return value
