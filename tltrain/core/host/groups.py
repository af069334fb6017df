"""The kernel's control groups, by which Slurm and containers limit what a process may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

OWN = Path("/proc/self/cgroup")
ALL = Path("/sys/fs/cgroup")
"""Where the kernel shows the control groups of this process, and all of them."""


def folders(controller: str) -> Iterator[Path]:
    """The folder of this process's group of a controller (cpu, memory), and those of the groups that it lies in."""
    for line in OWN.read_text().splitlines() if OWN.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):  # of the second version, or of the first, which has a tree for each kind
            here = ALL / controllers / path.lstrip("/")
            yield from (here, *here.parents)
