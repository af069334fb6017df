"""Opens the caches of a run on all ranks and fills missing rows. If a cache cannot be filled, the reason is printed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tltrain.cache import disk_store, feature_table, image_cache
from tltrain.cache.cost_model import Choice
from tltrain.cache.disk_store import Store
from tltrain.cache.feature_table import Layout, Made, Rows
from tltrain.cache.frozen import FrozenModel
from tltrain.cache.image_cache import ImageCache
from tltrain.cache.keys import CacheContext, row_key
from tltrain.cache.planner import CHUNK, store_root
from tltrain.core.errors import UserError
from tltrain.core.output.console import Console, clock, duration
from tltrain.data import Split
from tltrain.data.loader import item_loader
from tltrain.data.mixing import apply_mixup
from tltrain.data.rendering import to_device
from tltrain.data.sampler import SampleRef
from tltrain.data.views import Views
from tltrain.distributed.consensus import FlagAllReduce
from tltrain.distributed.runtime import Runtime
from tltrain.models.factory import Loaded


@dataclass(frozen=True)
class CacheFiller:
    """Opens and fills caches. Its methods are collective: all ranks call them in the same order."""

    context: CacheContext
    runtime: Runtime
    console: Console
    workers: int
    disk_budget: int
    """Maximum bytes of all caches on this machine."""
    should_stop: Callable[[str], bool]
    """Called with the progress of the filling. Returns True if a stop is requested. Filling ends then."""

    def rows(self, choice: Choice, kind: str, frozen: FrozenModel, loaded: Loaded, views: Views, made_by: dict[str, Any]) -> Rows | None:
        """Cached outputs of a frozen network for views, filled. None if they cannot be filled. made_by: metadata for `tltrain cache`."""
        place, split = choice.place, views.split
        assert place is not None
        layout = Layout.of(len(split), choice.num_views, choice.speed.row_bytes, frozen.chunk or CHUNK["cpu"])
        key = row_key(self.context, kind, frozen, loaded, split, views.augment, choice.num_views, views.erase, views.mixing)
        key |= {"shard_rows": layout.shard_rows}
        opened = self._open(choice, kind, key, made_by)
        if opened is None:
            return None
        with ExitStack() as on_failure:
            on_failure.enter_context(opened)
            make = partial(self._make, views, layout, frozen)
            if self.fill(opened, choice, choice.num_bytes, layout.names(), make) is not None:
                return None
            on_failure.pop_all()
        try:
            return Rows(opened, layout, place, self.runtime.device)
        except torch.OutOfMemoryError:
            self.console.say(f"cache   {choice.stage}: {choice.what} read from memory: the device has no room", style="yellow")
        return Rows(opened, layout, "memory", self.runtime.device)

    def images(self, choice: Choice, split: Split, made_by: dict[str, Any]) -> tuple[Store, ImageCache] | None:
        """The cached base images of a split, and their open store. None if they cannot be filled. The caller closes the store."""
        preprocess = self.context.preprocess
        opened = self._open(choice, image_cache.KIND, image_cache.key(self.context.fingerprint, split.name, preprocess), made_by)
        if opened is None:
            return None
        cache = ImageCache(opened.path, split, preprocess)
        needed = len(split) * choice.speed.row_bytes
        with ExitStack() as on_failure:
            on_failure.enter_context(opened)
            if self.fill(opened, choice, needed, cache.names(), lambda names: cache.make(names, self.workers)) is not None:
                return None
            on_failure.pop_all()
        return opened, cache

    def fill(self, opened: Store, choice: Choice, needed: int, names: list[str], make: Callable[[list[str]], Made]) -> str | None:
        """Make room for `needed` bytes, then fill. Returns None, or why the cache is incomplete. Collective.

        The reason is printed unless a stop was requested. One process per machine makes room, since each machine may have its own disk.
        """
        runtime, root, limit = self.runtime, opened.path.parent, self.disk_budget
        try:
            has_room = runtime.local_rank > 0 or disk_store.make_room(root, needed, limit, opened.path)
        except OSError:  # raising on one rank would leave the others waiting
            has_room = False
        all_have = bool(runtime.gather(torch.tensor([int(has_room)], device=runtime.device)).min())
        why = None if all_have else f"the other caches in {root} are in use and leave no room"
        began = clock()

        def show(where: str) -> bool:
            self.console.busy(f"cache   {choice.stage}: {choice.what}: {where}")
            return self.should_stop(where)

        why = why or feature_table.fill(runtime, opened, names, make, show)
        self.console.busy(None)
        if why is None and clock() - began > 1:
            self.console.say(f"cache   {choice.stage}: {choice.what} ready after {duration(clock() - began)}")
        if why is not None and why != feature_table.STOPPED:
            self.console.say(f"cache   {choice.stage}: {choice.what} computed on the fly: {why}", style="yellow")
        return why

    def _open(self, choice: Choice, kind: str, key: dict[str, Any], made_by: dict[str, Any]) -> Store | None:
        """Open a store on every rank. If one rank fails (for example with a full disk), print why and return None. Collective."""
        opened, why = None, "another process could not write"
        try:
            opened = Store(store_root(), kind, key, made_by)
        except (OSError, UserError) as error:
            why = str(error)
        if not FlagAllReduce(self.runtime, 1).sum_now([int(opened is None)])[0]:
            return opened
        if opened is not None:
            opened.close()
        self.console.say(f"cache   {choice.stage}: {choice.what} computed on the fly: {why}", style="yellow")
        return None

    def _make(self, views: Views, layout: Layout, frozen: FrozenModel, names: list[str]) -> Made:
        """Compute shards in order. Data workers load the images, and the network runs on one chunk at a time."""
        chunk = frozen.chunk if frozen.chunk is not None and frozen.chunk > 1 else CHUNK["cpu"]  # images are not loaded one by one
        device = self.runtime.device
        batches: list[list[SampleRef]] = []
        for name in names:
            view, rows = layout.rows(name)
            batches += [[SampleRef(i, view) for i in rows[at : at + chunk]] for at in range(0, len(rows), chunk)]
        loaded = iter(item_loader(views, batches, self.workers, device.type == "cuda"))
        num, done = sum(map(len, batches)), 0
        for name in names:
            _, rows = layout.rows(name)
            parts = []
            for at in range(0, len(rows), chunk):
                self.should_stop(f"row {done + at + 1:,} of {num:,}")  # tells the watchdog; a stop takes effect between shards
                parts.append(frozen(apply_mixup(to_device(next(loaded), device))["image"]))
            done += len(rows)
            yield name, {"rows": torch.cat(parts).cpu()}
