"""Processor cores that this process may use. Data workers, threads and runs side by side are counted by them."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

from tltrain.core.host import groups


def num_cores() -> int:
    """Cores of the machine, or fewer where Slurm, taskset or a container leaves this process fewer. At least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for group in groups.folders("cpu") if (quota := _quota(group)) is not None)]))


def _quota(group: Path) -> float | None:
    """Cores by a quota and a period in microseconds. None where there is no limit."""
    for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # of the second version, and of the first
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = " ".join((group / file).read_text() for file in files).split()
            return int(quota) / int(period) if int(quota) > 0 else None  # -1 in the first version
    return None
