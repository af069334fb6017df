"""Tables of cached rows, such as features or logits, looked up by (position, view). All processes fill a table together.

Rows lie in shards of fixed size that do not depend on the number of processes. An interrupted fill continues where it stopped. A damaged
shard is computed again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tltrain.cache import disk_store
from tltrain.cache.disk_store import Store
from tltrain.distributed.consensus import FlagAllReduce
from tltrain.distributed.runtime import Runtime

Place = Literal["device", "memory", "disk"]
SHARD_BYTES, SHARD_ROWS = 16 * 2**20, 512
STOPPED = "a stop was requested"
STOP, ERROR = range(2)  # the flags that ranks all-reduce


@dataclass(frozen=True)
class Layout:
    """The shards of a table and their rows. Each view has its own shards, so that stages with different numbers of views share them."""

    num_samples: int
    num_views: int
    shard_rows: int

    @classmethod
    def of(cls, num_samples: int, num_views: int, row_bytes: int, chunk: int) -> Layout:
        """chunk: rows that are computed together. A shard holds a multiple of it."""
        rows = min(SHARD_ROWS, max(1, SHARD_BYTES // row_bytes))
        return cls(num_samples, num_views, max(1, rows // chunk) * chunk)

    @property
    def per_view(self) -> int:
        """Shards of one view."""
        return -(-self.num_samples // self.shard_rows)

    def names(self) -> list[str]:
        """The names of all shards, view by view."""
        return [f"v{view:04d}-{shard:06d}" for view in range(self.num_views) for shard in range(self.per_view)]

    def rows(self, name: str) -> tuple[int, range]:
        """(view, samples) of a shard."""
        view, shard = (int(part) for part in name[1:].split("-"))
        return view, range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_samples))


Made = Iterator[tuple[str, dict[str, Tensor]]]


def fill(
    runtime: Runtime, store: Store, names: Sequence[str], make: Callable[[list[str]], Made], should_stop: Callable[[str], bool]
) -> str | None:
    """Compute and write every shard that is missing or damaged, each on one process. Collective.

    Returns None, or the reason why the store is incomplete.
    make: maps names to (name, tensors) in the same order. should_stop(where): called before each shard; True if a stop was requested.
    All processes advance one shard at a time, so that none waits for another longer than one shard takes.
    """
    agreement = FlagAllReduce(runtime, 2)
    missing = _missing(runtime, store, names, should_stop)
    why = _rounds(agreement, store, missing, make, should_stop, runtime.rank, runtime.world)
    if why is None and missing and (missing := _missing(runtime, store, names, None)):
        # The machines do not share their cache folders. Each fills its own, in as many rounds as the one with the fewest processes needs.
        parts = int(runtime.gather(torch.tensor([runtime.local_world], device=runtime.device)).min())
        why = _rounds(agreement, store, missing, make, should_stop, runtime.local_rank, parts)
        if why is None and _missing(runtime, store, names, None):
            why = "the processes of one machine do not share a store: their devices differ, or their cache folders"
    return why


def _missing(runtime: Runtime, store: Store, names: Sequence[str], should_stop: Callable[[str], bool] | None) -> list[str]:
    """Shards that are absent or damaged for at least one process. The processes of a machine divide the checking among them.

    should_stop: as in `fill`; after a stop, the remaining shards count as missing. None: shards are listed but not checked.
    """
    shards = store.list_shards()
    gone = torch.zeros(len(names), dtype=torch.int64)
    for i, name in enumerate(names):
        mine = i % runtime.local_world == runtime.local_rank
        if name not in shards:
            gone[i] = 1
        elif should_stop is not None and mine:
            gone[i] = should_stop(f"reading shard {i + 1} of {len(names)}") or not _is_valid(store, shards[name])
    gone = runtime.gather(gone.unsqueeze(0).to(runtime.device)).amax(0).cpu()
    return [name for name, is_gone in zip(names, gone.tolist(), strict=True) if is_gone]


def _is_valid(store: Store, file: Path) -> bool:
    try:
        return store.verify_shard(file)
    except OSError:  # computed again; an exception on one process would leave the others waiting
        return False


def _rounds(
    agreement: FlagAllReduce,
    store: Store,
    missing: list[str],
    make: Callable[[list[str]], Made],
    should_stop: Callable[[str], bool],
    part: int,
    parts: int,
) -> str | None:
    """Write shards part, part + parts, ... of `missing`. Returns None, or the reason why some are not written. Collective."""
    mine = missing[part::parts] if part < parts else []
    computed, why = iter(make(mine)) if mine else iter(()), ""
    for number in range(-(-len(missing) // parts)):
        # One shard a round. A process that has none left, or that could not write one, still takes part in the all-reduce below.
        stop = should_stop(f"shard {number * parts + part + 1} of {len(missing)}")
        if number < len(mine) and not why and not stop:
            try:
                store.write(*next(computed))
            except OSError as error:
                why = str(error)
        flags = agreement.sum_now([int(stop), int(bool(why))])
        if flags[STOP]:
            return STOPPED
        if flags[ERROR]:
            return why or "another process could not write"
    return None


class Rows:
    """Looks up rows of a filled store: on the device, in host memory, or memory-mapped from disk."""

    def __init__(self, store: Store, layout: Layout, place: Place, device: torch.device) -> None:
        """The store stays open until `close`."""
        self.store, self.layout, self.place, self.device = store, layout, place, device
        self.places_N: Tensor | None = None
        shards = store.list_shards()
        parts = [disk_store.read(shards[name])["rows"] for name in layout.names()]
        self.parts: list[Tensor] = parts
        if place != "disk":
            where = device if place == "device" else torch.device("cpu")
            whole = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]), device=where)
            for own, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
                own.copy_(part)
            self.parts = [whole]

    def __call__(self, position_B: Tensor, view_B: Tensor) -> Tensor:
        """Rows (B, ...) on the device, for positions and views (B,) int64 in host memory."""
        if self.places_N is not None:
            position_B = self.places_N[position_B]
        row_B = view_B * self.layout.num_samples + position_B
        if self.place == "device":
            return self.parts[0].index_select(0, row_B.to(self.device, non_blocking=True))
        out = self._gather(position_B, view_B) if self.place == "disk" else self.parts[0].index_select(0, row_B)
        return out if self.device.type == "cpu" else out.pin_memory().to(self.device, non_blocking=True)

    def _gather(self, position_B: Tensor, view_B: Tensor) -> Tensor:
        out = self.parts[0].new_empty((len(position_B), *self.parts[0].shape[1:]))
        shard_B = view_B * self.layout.per_view + position_B // self.layout.shard_rows
        row_B = position_B % self.layout.shard_rows
        for i, (shard, row) in enumerate(zip(shard_B.tolist(), row_B.tolist(), strict=True)):
            out[i] = self.parts[shard][row]
        return out

    def part(self, places_N: np.ndarray) -> Rows:
        """The rows of a split, by position in it. places_N: (N,) their positions in this table. Both are closed, and share the memory."""
        part = copy.copy(self)
        part.places_N = torch.from_numpy(places_N)
        return part

    def close(self) -> None:
        self.parts = []
        self.store.close()
