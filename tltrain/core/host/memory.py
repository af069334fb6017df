"""Host memory that this process may use. `tltrain doctor` prints it and the planner divides it."""

from __future__ import annotations

import contextlib
import ctypes

import psutil

from tltrain.core.host import groups


def total_memory() -> int:
    """Bytes of the machine, or the limit of this process's control groups where that is lower."""
    return min([psutil.virtual_memory().total, *_limits()])


def free_memory() -> int:
    """Bytes that could be allocated now without swapping, and at most the limit of this process's control groups."""
    return min([psutil.virtual_memory().available, *_limits()])


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from glibc's malloc.h."""
LARGE = 2**30
"""Bytes up to which freed blocks are kept, one by one and together."""


def keep_freed_memory() -> None:
    """Let the allocator keep freed blocks for the next step, in this process. Does nothing where it is not glibc's.

    glibc returns blocks of more than 32 MB to the kernel at once. A training step on a CPU takes many of them, and the kernel clears each
    page of them anew, which took two fifths of the time of a step of a small network at 224 px.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, LARGE)


def return_freed_memory() -> None:
    """Return what `keep_freed_memory` kept to the kernel, for other programs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _limits() -> list[int]:
    """Bytes that control groups leave this process, as containers and Slurm set them."""
    limits: list[int] = []
    for group in groups.folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of the second version, and of the first
            with contextlib.suppress(OSError, ValueError):  # no limit here, or "max"
                limits.append(int((group / name).read_text()))
    return limits
