"""Estimates how long solving a head takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from tltrain.heads import logistic, ridge
from tltrain.heads.solve import FOLDS, ONE_FOLD_FROM, Kind
from tltrain.heads.standardised import one_thread

SIDE = 768
"""Of the matrices by which this machine is timed."""
EIGEN = 8
"""Products of square matrices that an eigendecomposition takes as long as."""
COARSE_LOOKS, FINE_LOOKS = 20, 80
"""Looks at the loss of a fit by logistic regression: for one strength in one fold, and for the head that is handed on. Counted on 500 to
5,000 rows of 512 to 2,048 columns and 8 to 100 classes."""


def solve_s(kind: Kind, num_rows: int, num_columns: int, num_classes: int) -> float:
    """Estimated seconds of `solve` on one thread, by products of matrices that are timed here once. It holds within a factor of about 2."""
    narrow, wide = sorted((num_rows, num_columns))
    number_s, look_s = _times(max(1, num_classes))
    if kind == "nearest_mean":
        return num_rows * num_columns * look_s
    basis_s = number_s * (narrow * narrow * wide + num_rows * num_columns * narrow + EIGEN * narrow**3)
    if kind == "ridge":
        return basis_s + len(ridge.STRENGTHS) * num_rows * narrow * look_s / 2
    fits = (1 if num_rows >= ONE_FOLD_FROM else FOLDS) * len(logistic.STRENGTHS)
    return basis_s + (fits * COARSE_LOOKS + FINE_LOOKS) * num_rows * narrow * look_s


def neighbours_s(num_rows: int, num_columns: int) -> float:
    """Estimated seconds in which `neighbours` compares every row with every other, in single precision."""
    return num_rows**2 * num_columns * _times(1)[0] / 2


@cache
def _times(num_classes: int) -> tuple[float, float]:
    """(seconds of one multiplication in a product of square matrices, of one entry of the features in a look at the loss: both in double,
    on one thread)."""
    square = torch.linspace(-1, 1, SIDE * SIDE, dtype=torch.float64).view(SIDE, SIDE)
    thin = square[:, :1].expand(SIDE, num_classes).contiguous()
    with one_thread():
        spent = [_least_s(lambda: square @ square), _least_s(lambda: square.T @ (square @ thin))]
    return spent[0] / SIDE**3, spent[1] / SIDE**2


def _least_s(work: Callable[[], object], times: int = 3) -> float:
    """The least time of this thread of several calls, which other load on the machine affects least."""
    spent = []
    for _ in range(times):
        began = time.thread_time()
        work()
        spent.append(time.thread_time() - began)
    return min(spent)
