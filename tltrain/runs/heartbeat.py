"""Signs of life in a run folder: who writes it, and where each process stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def beat_file(generations: Path, generation: int, rank: int) -> Path:
    return generations / f"{generation:06d}.rank{rank:05d}"


def failed_file(generations: Path, generation: int) -> Path:
    """What the process said that failed first."""
    return generations / f"{generation:06d}.failed"


def read_beat(generations: Path, generation: int, rank: int) -> dict[str, Any] | None:
    try:
        return dict(json.loads(beat_file(generations, generation, rank).read_text()))
    except (OSError, ValueError):
        return None


def newest_generation(generations: Path) -> int:
    """The highest generation that was claimed; 0 for none."""
    return max((int(path.name) for path in generations.iterdir() if path.name.isdigit()), default=0) if generations.is_dir() else 0
