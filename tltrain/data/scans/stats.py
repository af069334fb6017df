"""Sizes and times of a million files: on threads where the disk is slow to answer."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np

from tltrain.core.files import in_parallel
from tltrain.core.output.progress import Pace

PART = 4096
SLOW_S = 40e-6
"""A file whose size takes longer, seconds, is on a network disk: many are then asked for at a time. A local disk takes 2e-6."""
NUM_THREADS = 32
PART_S = 3600.0
"""Longest time for a part, seconds."""

ABSENT = -1


def sizes_and_times(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 each: size in bytes and time of the last change in nanoseconds. ABSENT where there is no such file."""
    num = len(paths)
    size_N, time_N = np.full(num, ABSENT, np.int64), np.full(num, ABSENT, np.int64)

    def look(begin: int) -> int:
        rows = [_size_and_time(path) for path in paths[begin : begin + PART]]
        size_N[begin : begin + len(rows)], time_N[begin : begin + len(rows)] = np.array(rows, np.int64).T
        return len(rows)

    pace, began, begins = Pace("files looked up", num), time.monotonic(), range(0, num, PART)
    for begin in begins[:1]:
        pace.advance(look(begin))
    if num > PART:
        slow = time.monotonic() - began > SLOW_S * PART
        for done in in_parallel(look, begins[1:], PART_S, NUM_THREADS) if slow else map(look, begins[1:]):
            pace.advance(done)
    return size_N, time_N


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in a path
        return ABSENT, ABSENT
    return found.st_size, found.st_mtime_ns
