"""The evaluation views of a split, each corrupted as its view number says."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tltrain.data.corruptions import OPERATIONS, SEVERITIES, corrupt
from tltrain.data.dataset import Split
from tltrain.data.views import Preprocess, Views


class Cell(NamedTuple):
    """One corruption in one severity. CLEAN: none."""

    name: str
    severity: int


CLEAN = Cell("clean", 0)
CELLS = (CLEAN, *(Cell(name, severity) for name in OPERATIONS for severity in SEVERITIES))
"""By view number: view 0 is the evaluation view as it is."""


class CorruptedViews(Views):
    """View v of an image is its evaluation view (resized and cropped, uint8), corrupted as CELLS[v] says, before it is normalised."""

    def __init__(self, split: Split, preprocess: Preprocess, seed: int) -> None:
        super().__init__(split, preprocess, "none", flip=False, seed=seed)

    def _view(self, i: int, v: int) -> np.ndarray:
        """uint8 (size, size, 3)."""
        clean = super()._view(i, 0)
        return clean if v == 0 else corrupt(clean, *CELLS[v], self.seed, self.split.ids[i])
