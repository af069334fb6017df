"""Processor cores that this process may use. Data workers, threads and runs side by side are counted by them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

OWN_GROUP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
"""Where the kernel shows the control groups of this process, and all of them."""


def num_cores() -> int:
    """Cores of the machine, or fewer where Slurm, taskset or a container leaves this process fewer. At least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(share) for share in _quotas())]))


def _quotas() -> Iterator[float]:
    """Cores whose time control groups leave this process, such as `docker run --cpus` sets."""
    with contextlib.suppress(OSError):
        for line in OWN_GROUP.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" or "cpu" in controllers.split(","):  # of the second version, or of the first, which has a tree for each kind
                here = GROUPS / controllers / path.lstrip("/")
                yield from (quota for folder in (here, *here.parents) if (quota := _quota(folder)) is not None)


def _quota(group: Path) -> float | None:
    """Cores by a quota and a period in microseconds. None where there is no limit."""
    for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # of the second version, and of the first
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = " ".join((group / file).read_text() for file in files).split()
            return int(quota) / int(period) if int(quota) > 0 else None  # -1 in the first version
    return None
