"""What is frozen, computed once: rows by (index, view) in shards of fixed size, filled by all processes, looked up by any.

Shards are the same whatever the number of processes. A killed fill goes on where it was; a damaged shard is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tltrain.cache import disk_store
from tltrain.cache.disk_store import Store
from tltrain.distributed.consensus import FlagAllReduce
from tltrain.distributed.runtime import Runtime

Place = Literal["device", "memory", "disk"]
SHARD_BYTES, SHARD_ROWS = 16 * 2**20, 512
ASKED = "it was asked to stop"
STOP, ERROR = range(2)  # the facts that ranks agree on


@dataclass(frozen=True)
class Layout:
    """Where rows lie: each view has its own shards, so that a stage finds those of another with fewer augmented views."""

    num_samples: int
    num_views: int
    shard_rows: int

    @classmethod
    def of(cls, num_samples: int, num_views: int, row_bytes: int, chunk: int) -> Layout:
        """chunk: rows that are computed together; a shard holds a multiple of it."""
        rows = min(SHARD_ROWS, max(1, SHARD_BYTES // row_bytes))
        return cls(num_samples, num_views, max(1, rows // chunk) * chunk)

    @property
    def per_view(self) -> int:
        return -(-self.num_samples // self.shard_rows)

    def names(self) -> list[str]:
        return [f"v{view:04d}-{shard:06d}" for view in range(self.num_views) for shard in range(self.per_view)]

    def rows(self, name: str) -> tuple[int, range]:
        """(view, the samples) of a shard."""
        view, shard = (int(part) for part in name[1:].split("-"))
        return view, range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_samples))


Made = Iterator[tuple[str, dict[str, Tensor]]]


def fill(
    runtime: Runtime, store: Store, names: Sequence[str], make: Callable[[list[str]], Made], asked: Callable[[str], bool]
) -> str | None:
    """Make every shard that is missing or damaged, each by one process. Collective. Returns None, or why the store is not whole.

    make: from names to (name, tensors), in that order. asked(where): called before each shard; True where somebody asked this
    process to stop. All processes go from shard to shard together, so that none waits for another longer than one shard takes.
    """
    agreement = FlagAllReduce(runtime, 2)
    missing = _missing(runtime, store, names, asked)
    why = _rounds(agreement, store, missing, make, asked, runtime.rank, runtime.world)
    if why is None and missing and (missing := _missing(runtime, store, names, None)):
        # Folders that the machines of a cluster do not share: each machine fills its own, in as many rounds as the smallest needs.
        parts = int(runtime.gather(torch.tensor([runtime.local_world], device=runtime.device)).min())
        why = _rounds(agreement, store, missing, make, asked, runtime.local_rank, parts)
        if why is None and _missing(runtime, store, names, None):
            why = "the processes of one machine do not share a store: their devices differ, or their cache folders"
    return why


def _missing(runtime: Runtime, store: Store, names: Sequence[str], asked: Callable[[str], bool] | None) -> list[str]:
    """Shards that at least one process does not find, or finds damaged. The processes of a machine share the reading.

    asked: as in `fill`; whom it stops calls the rest missing. None: nothing is read.
    """
    standing = store.list_shards()
    gone = torch.zeros(len(names), dtype=torch.int64)
    for i, name in enumerate(names):
        mine = i % runtime.local_world == runtime.local_rank
        if name not in standing:
            gone[i] = 1
        elif asked is not None and mine:
            gone[i] = asked(f"reading shard {i + 1} of {len(names)}") or not _sound(store, standing[name])
    gone = runtime.gather(gone.unsqueeze(0).to(runtime.device)).amax(0).cpu()
    return [name for name, is_gone in zip(names, gone.tolist(), strict=True) if is_gone]


def _sound(store: Store, file: Path) -> bool:
    try:
        return store.verify_shard(file)
    except OSError:  # what cannot be read is made again; an error of one process would let the others wait
        return False


def _rounds(
    agreement: FlagAllReduce,
    store: Store,
    missing: list[str],
    make: Callable[[list[str]], Made],
    asked: Callable[[str], bool],
    part: int,
    parts: int,
) -> str | None:
    mine = missing[part::parts] if part < parts else []
    made, why = iter(make(mine)) if mine else iter(()), ""
    for number in range(-(-len(missing) // parts)):
        stop = asked(f"shard {number * parts + part + 1} of {len(missing)}")
        if number < len(mine) and not why and not stop:
            try:
                store.write(*next(made))
            except OSError as error:
                why = str(error)
        flags = agreement.sum_now([int(stop), int(bool(why))])
        if flags[STOP]:
            return ASKED
        if flags[ERROR]:
            return why or "another process could not write"
    return None


class Rows:
    """A filled store's rows, ready to be looked up: on the device, in memory, or memory-mapped from the disk."""

    def __init__(self, store: Store, layout: Layout, place: Place, device: torch.device) -> None:
        """Holds the store open until `close`."""
        self.store, self.layout, self.place, self.device = store, layout, place, device
        standing = store.list_shards()
        parts = [disk_store.read(standing[name])["rows"] for name in layout.names()]
        self.parts: list[Tensor] = parts
        if place != "disk":
            where = device if place == "device" else torch.device("cpu")
            whole = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]), device=where)
            for own, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
                own.copy_(part)
            self.parts = [whole]

    def __call__(self, index_B: Tensor, view_B: Tensor) -> Tensor:
        """Rows (B, ...) on the device, for indices and views (B,) int64 in host memory."""
        row_B = view_B * self.layout.num_samples + index_B
        if self.place == "device":
            return self.parts[0].index_select(0, row_B.to(self.device, non_blocking=True))
        out = self._gather(index_B, view_B) if self.place == "disk" else self.parts[0].index_select(0, row_B)
        return out if self.device.type == "cpu" else out.pin_memory().to(self.device, non_blocking=True)

    def _gather(self, index_B: Tensor, view_B: Tensor) -> Tensor:
        out = self.parts[0].new_empty((len(index_B), *self.parts[0].shape[1:]))
        shard_B = view_B * self.layout.per_view + index_B // self.layout.shard_rows
        row_B = index_B % self.layout.shard_rows
        for i, (shard, row) in enumerate(zip(shard_B.tolist(), row_B.tolist(), strict=True)):
            out[i] = self.parts[shard][row]
        return out

    def close(self) -> None:
        self.parts = []
        self.store.close()
