"""Host memory that this process may use. `tltrain doctor` prints it and the planner divides it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil


def total_memory() -> int:
    """Bytes of the machine, or the limit of this process's control groups where that is lower."""
    return min([psutil.virtual_memory().total, *_limits()])


def free_memory() -> int:
    """Bytes that could be allocated now without swapping, and at most the limit of this process's control groups."""
    return min([psutil.virtual_memory().available, *_limits()])


def _limits() -> list[int]:
    """Bytes that control groups leave this process, as containers and Slurm set them."""
    limits: list[int] = []
    file = Path("/proc/self/cgroup")
    for line in file.read_text().splitlines() if file.exists() else ():
        number, kinds, path = line.split(":", 2)
        root, name = ("/sys/fs/cgroup", "memory.max") if number == "0" else ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        if number != "0" and "memory" not in kinds.split(","):
            continue
        here = Path(root + path)
        for folder in (here, *here.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit here, or "max"
                limits.append(int((folder / name).read_text()))
    return limits
