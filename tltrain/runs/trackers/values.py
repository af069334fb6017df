"""Values that several trackers share: the figures of a row, the confusions of a test, and the identity of a run."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.core import files

_PLACE = {"stage_index", "step", "run_step", "time"}
MOST_CONFUSIONS = 2000
"""Cells of a confusion matrix that a tracker is given. Of 1,000 classes it has a million, and nobody reads them one by one."""


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row under its kind, such as train/loss and val/epoch, without those that say where in the run it stands."""
    numbers = {k: v for k, v in row.items() if k not in _PLACE and isinstance(v, int | float) and not isinstance(v, bool)}
    return {f"{row['kind']}/{k}": float(v) for k, v in numbers.items()}


def confusions(matrix: Sequence[Sequence[int]], classes: Sequence[str], limit: int = MOST_CONFUSIONS) -> list[tuple[str, str, int]]:
    """(actual, predicted, images) of the cells above zero: first the mistakes, the most frequent first, then the right answers."""
    counts = np.asarray(matrix)
    actual, predicted = np.nonzero(counts)
    order = np.lexsort((predicted, actual, -counts[actual, predicted], actual == predicted))[:limit]
    return [(classes[a], classes[p], int(counts[a, p])) for a, p in zip(actual[order], predicted[order], strict=True)]


def confusion_title(matrix: Sequence[Sequence[int]], shown: int) -> str:
    """Says what of the matrix a tracker shows."""
    cells = int(np.count_nonzero(np.asarray(matrix)))
    return "Test confusion" if shown >= cells else f"Test confusion, {shown:,} of {cells:,} cells above zero, the worst first"


def kept_id(run: Path, tracker: str) -> str:
    """The identity of this run at a tracker, RUN/TRACKER_id: drawn by the first start and used by all."""
    file = run / f"{tracker}_id"
    if not file.exists():
        files.write_atomic(file, uuid.uuid4().hex[:10])
    return files.read_text(file)
