"""Stores of a few shards, for the tests of what is done to them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from tltrain.cache import disk_store
from tltrain.cache.disk_store import Store


def rows(number: int, num_bytes: int = 100_000) -> dict[str, Tensor]:
    return {"rows": torch.full((num_bytes,), number, dtype=torch.uint8)}


def made_store(root: Path, number: int, num_shards: int = 1, age_s: float = 0.0) -> Path:
    """A closed store of shards of 100 kB, last used `age_s` ago."""
    with Store(root, "test", {"number": number}, {"recipe": "a"}) as store:
        for i in range(num_shards):
            store.write(f"{i:06d}", rows(i))
    os.utime(store.path / disk_store.LOCK, (time.time() - age_s,) * 2)
    return store.path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
