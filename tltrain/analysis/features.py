"""Features of a recipe's images before any block of its network, read from the stores that training uses, or filled into them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tltrain.analysis.pooling import pooled
from tltrain.analysis.samples import EVERY, WITHOUT_TEST, Samples, samples_of
from tltrain.cache.cost_model import Choice, Speed
from tltrain.cache.feature_table import Rows
from tltrain.cache.filling import CacheFiller
from tltrain.cache.frozen import FrozenModel
from tltrain.cache.keys import CacheContext
from tltrain.cache.measure import row_bytes
from tltrain.cache.planner import CHUNK, find_budget, finds_place_matters, prefix_of
from tltrain.core.errors import StoppedAtOnce, UserError, some
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console, size
from tltrain.core.recipe import Recipe, Stage
from tltrain.data import DataSplits, Split, open_images
from tltrain.data.loader import item_loader
from tltrain.data.rendering import to_device
from tltrain.data.sampler import SampleRef
from tltrain.data.views import Views
from tltrain.data.workers import heard_while_waiting
from tltrain.distributed.runtime import Runtime, torch_settings_kept
from tltrain.distributed.signals import StopSignal
from tltrain.models.chain import on_device
from tltrain.models.factory import Loaded, head_input
from tltrain.training.experiment import open_nets
from tltrain.training.setup import num_workers

__all__ = ["EVERY", "HEAD", "WITHOUT_TEST", "FeatureBank"]

HEAD = "head"
READ_ROWS = 256
"""Stored rows that are read, and pooled, at a time."""


@dataclass(frozen=True)
class FeatureBank(Samples):
    """The images of a recipe and its network, frozen on the device. Features are of the evaluation view, in the order of `Samples`.

    Open it by `with FeatureBank.open(recipe, flags, console) as bank:`, and close it before anything trains in this process.
    """

    recipe: Recipe
    flags: RunFlags
    loaded: Loaded
    runtime: Runtime
    console: Console
    _known: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(
        cls, recipe: Recipe, flags: RunFlags, console: Console, *, images: DataSplits | None = None, which: Iterable[str] = WITHOUT_TEST
    ) -> Iterator[Self]:
        """Open the images and the network as training does, with the weights that its first stage begins with.

        images: those of `open_images(recipe.data)`, where they are open already. which: the names of the splits that are wanted; those
        that the data lacks are left out. Raises UserError, and for several processes.
        """
        if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise UserError(f"features are looked at in one process, and the launcher started {world}; run the command without it")
        images = open_images(recipe.data) if images is None else images
        samples = samples_of(images, which)
        with torch_settings_kept():
            runtime = Runtime(recipe.deterministic, 60 * flags.timeout_minutes)
            try:
                loaded, _ = open_nets(recipe.model_copy(update={"distill": None}), images)
                on_device(loaded.chain.freeze(len(loaded.chain.blocks), norm_stats=False), runtime.device).eval()
                loaded.chain.place_matters = finds_place_matters(loaded, runtime.device, runtime.accelerator.autocast)
                yield cls(samples.images, samples.splits, recipe, flags, loaded, runtime, console)
            finally:
                runtime.close()

    def cut(self, where: str | int) -> int:
        """The index of the block that `where` names: a block, a group of blocks (layer4), or head. Raises UserError.

        Of a network that runs whole only the head can be asked for.
        """
        blocks = self.loaded.chain.blocks
        names = [block.name for block in blocks]
        index = where if isinstance(where, int) else next((i for i, n in enumerate(names) if n == where or n.startswith(f"{where}.")), -1)
        name = self.loaded.card.name
        if not 0 <= index < len(blocks):
            raise UserError(f"cut {where!r}: no block of {name} is called that; its blocks: {some(names[1:][::-1])}")
        if index == 0:
            raise UserError(f"cut {where!r}: that is the first block of {name}, and no features come before it; take a later one")
        if self.loaded.chain.runs_whole and index < len(blocks) - 1:
            raise UserError(f"cut {where!r}: {name} runs whole, so that only the features before its head are known; take {HEAD}")
        return index

    def frozen(self, cut: int) -> FrozenModel:
        """The blocks before `cut`, as training runs them where they are frozen."""
        return prefix_of(self.loaded.chain, cut, self.runtime.precision, True, self.runtime.accelerator.autocast)

    def row_bytes(self, where: str | int = HEAD) -> int:
        """Bytes that the store of this cut takes for an image. 0 for a network that runs whole: its features are never stored."""
        cut = self.cut(where)
        return 0 if self.loaded.chain.runs_whole else row_bytes(self.frozen(cut), self.loaded.preprocess.size, self.runtime.device)

    def features(self, where: str | int = HEAD) -> Tensor:
        """Features (N, D) float32 in host memory: what the block `where` is given for each image, pooled to a vector (`pooled`).

        Rows that are not in the store of this cut are computed and kept there, unless `--cache never` or the disk budget forbids it.
        Training reads the same stores. Raises UserError; StoppedAtOnce for a signal, after which the finished shards are kept.
        """
        cut = self.cut(where)
        if cut not in self._known:
            with StopSignal().listening() as stop, heard_while_waiting(lambda: stop.signal is not None):
                try:
                    self._known[cut] = torch.cat([torch.cat(list(self._pooled(split, cut, stop))) for split in self.splits])
                except UserError:
                    if stop.signal is None:
                        raise
                    raise StoppedAtOnce(stop.signal) from None  # a wait for images ended by the signal
                finally:
                    self.console.busy(None)
        return self._known[cut]

    def _pooled(self, split: Split, cut: int, stop: StopSignal) -> Iterator[Tensor]:
        """Pooled features of a split, some images at a time, on the host."""
        what = f"{self.loaded.card.name} before {self.loaded.chain.blocks[cut].name}, {split.name}"

        def should_stop(where: str) -> bool:
            self.console.busy(f"features  {what}: {where}")
            if stop.signal is not None:
                raise StoppedAtOnce(stop.signal)
            return False

        shared = self.images.shared
        held = self._views(split if shared is None else shared.split)
        rows = None if self.loaded.chain.runs_whole else self._stored(held, cut, what, should_stop)
        if rows is None:
            yield from self._computed(self._views(split), cut, should_stop)
            return
        position_N = np.arange(len(split)) if shared is None else shared.positions(split)
        try:
            for position_B in torch.from_numpy(position_N).split(READ_ROWS):
                yield pooled(self.loaded.chain, rows(position_B, torch.zeros_like(position_B))).cpu()
        finally:
            rows.close()

    def _views(self, split: Split) -> Views:
        return Views(split, self.loaded.preprocess, "none", self.recipe.data.flip, self.recipe.data.seed)

    def _stored(self, views: Views, cut: int, what: str, should_stop: Any) -> Rows | None:
        """The filled store of a split. None where it may not be kept, or cannot be written: the reason is printed."""
        device, split, flags = self.runtime.device, views.split, self.flags
        if flags.cache == "never":
            return None
        budget, num_bytes = find_budget(flags, device, 1).disk, self.row_bytes(cut) * len(split)
        if num_bytes > budget:
            self.console.say(
                f"cache   features of {what}: not stored, {size(num_bytes)} are above the disk budget of {size(budget)}", "yellow"
            )
            return None
        speed = Speed(0.0, 0.0, num_bytes // len(split))
        choice = Choice(HEAD, f"features of {what}", len(split), 1, speed, place="disk")
        context = CacheContext.of(self.recipe, self.images, self.loaded.preprocess, device, self.runtime.precision)
        if (shared := self.images.shared) is not None:  # the folds of a recipe share a store of all their images
            context = replace(context, fingerprint=shared.fingerprint)
        filler = CacheFiller(context, self.runtime, self.console, self._workers, budget, should_stop)
        return filler.rows(choice, "features", self.frozen(cut), self.loaded, views, self._origin(split, cut))

    def _origin(self, split: Split, cut: int) -> dict[str, Any]:
        """What `tltrain cache verify` needs to compute the rows again: a recipe whose first stage is cut there."""
        stage = Stage(name="features", unfreeze=self.loaded.chain.blocks[cut].name, steps=1, lr=1e-3, views=1)
        recipe = self.recipe.model_copy(update={"stages": (stage,), "distill": None})
        return {"recipe": recipe.model_dump(mode="json"), "split": split.name, "stage": 0, "run": ""}

    def _computed(self, views: Views, cut: int, should_stop: Any) -> Iterator[Tensor]:
        """Pooled features of a split that is not stored, a chunk at a time."""
        device, chain, num = self.runtime.device, self.loaded.chain, len(views.split)
        chunk, head = CHUNK.get(device.type, 64), self.loaded.family.head_of(self.loaded.card)
        frozen = self.frozen(cut)
        batches = [[SampleRef(i, 0) for i in range(at, min(at + chunk, num))] for at in range(0, num, chunk)]
        for number, batch in enumerate(item_loader(views, batches, self._workers, device.type == "cuda")):
            should_stop(f"image {number * chunk + 1:,} of {num:,}")
            images = to_device(batch, device)["image"]
            if chain.runs_whole:
                with torch.no_grad(), frozen.autocast():
                    yield pooled(chain, head_input(chain, head, images)).cpu()
            else:
                yield pooled(chain, frozen(images)).cpu()

    @property
    def _workers(self) -> int:
        return num_workers(self.images, self.flags, 1)
