"""A cross-validation as an entry of a comparison: paired with another image by image."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tltrain.core.errors import UserError
from tltrain.runs.folds.page import PAGE
from tltrain.runs.folds.pooled import Pooled, pool
from tltrain.runs.pages.comparison import ComparedRun
from tltrain.runs.record import Predicted
from tltrain.runs.report.formatting import finished_of


@dataclass(frozen=True)
class PredictedOften(Predicted):
    """Predictions of every image by networks that never saw it. `predicted` is that of the first repeat."""

    shares: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(N,) the share of the repeats that are right, float64; bool for one repeat."""

    @property
    def right(self) -> np.ndarray:
        """(N,), as `shares`."""
        return self.shares


def compared_folds(name: str, path: Path) -> ComparedRun:
    """A folder of folds with its pooled figures. Raises UserError where a fold is not finished."""
    pooled = pool(path)
    if pooled is None or not pooled.is_whole:
        missing = "no fold is finished" if pooled is None else finished_of(len(pooled.runs), len(pooled.folder.members))
        raise UserError(f"{path}: {missing}, so that images are missing; let `tltrain folds` finish it, or leave it out")
    return ComparedRun(name, pooled.record, _predicted(pooled), pooled.accuracy, pooled.f1, page=PAGE, is_folds=True)


def _predicted(pooled: Pooled) -> PredictedOften:
    p, classes = pooled.predictions, pooled.names
    right_N = p.right
    samples = tuple((name, classes[label]) for name, label in zip(p.ids, p.label.tolist(), strict=True))
    shares = right_N == 1 if pooled.folder.repeats == 1 else right_N
    return PredictedOften(samples, p.label, p.predicted[0], p.group, shares=shares)
