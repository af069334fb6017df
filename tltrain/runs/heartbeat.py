"""Heartbeat files of a run folder: one for each process, with its position and the time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tltrain.core import files


def beat_file(generations: Path, generation: int, rank: int) -> Path:
    """The heartbeat file of one process."""
    return generations / f"{generation:06d}.rank{rank:05d}"


def failed_file(generations: Path, generation: int) -> Path:
    """The failure details of the process that failed first."""
    return generations / f"{generation:06d}.failed"


def read_beat(generations: Path, generation: int, rank: int) -> dict[str, Any] | None:
    """The last heartbeat of a process; None if it has written none."""
    try:
        return dict(json.loads(files.read_bytes(beat_file(generations, generation, rank))))
    except (OSError, ValueError):
        return None


def newest_generation(generations: Path) -> int:
    """The highest generation that a start has claimed; 0 if there is none."""
    return max((int(path.name) for path in generations.iterdir() if path.name.isdigit()), default=0) if generations.is_dir() else 0
