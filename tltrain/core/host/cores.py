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
            number, _, path = line.split(":", 2)
            if number == "0":  # of the second version, which alone has this file
                here = GROUPS / path.lstrip("/")
                yield from (quota for folder in (here, *here.parents) if (quota := _quota(folder / "cpu.max")) is not None)


def _quota(file: Path) -> float | None:
    """Cores by a file "quota period" in microseconds. None where there is no limit."""
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    return None
