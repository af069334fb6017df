"""The stores of one stage: opened, filled where rows are missing, and attached to the batches that ask for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from tltrain.cache import disk_store, feature_table, image_cache
from tltrain.cache.cost_model import Choice
from tltrain.cache.disk_store import Store
from tltrain.cache.feature_table import Layout, Made, Rows
from tltrain.cache.frozen import FrozenModel
from tltrain.cache.image_cache import ImageCache
from tltrain.cache.planner import CHUNK, store_root
from tltrain.core.errors import UserError
from tltrain.core.output.console import clock, duration
from tltrain.core.recipe import Augment
from tltrain.core.stage_plan import StagePlan
from tltrain.data import Split
from tltrain.data.loader import item_loader
from tltrain.data.rendering import to_device
from tltrain.data.sampler import SampleRef
from tltrain.data.views import Batch, Views
from tltrain.distributed.consensus import FlagAllReduce
from tltrain.models.factory import Loaded
from tltrain.training.setup import Run

FORMAT = 1
"""Another number where the code makes other bytes of the same: then no older store is taken for a new one."""
VERSIONS = ("torch", "torchvision", "pillow", "numpy", "transformers")


@dataclass
class StageStores:
    """Rows that a stage looks up; None where it computes them."""

    train: Rows | None = None
    val: Rows | None = None
    teacher: Rows | None = None

    @property
    def opened(self) -> list[Rows]:
        return [rows for rows in (self.train, self.val, self.teacher) if rows is not None]

    def close(self) -> None:
        for rows in self.opened:
            rows.close()


@dataclass
class Attached:
    """Batches with rows looked up for them, as often as they are gone through."""

    batches: Iterable[Batch]
    rows: dict[str, Rows] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield {**batch, **{name: rows(batch["index"], batch["view"]) for name, rows in self.rows.items()}}


def open_stores(
    run: Run, stage: StagePlan, prefix: FrozenModel | None, teacher: FrozenModel | None, asked: Callable[[str], bool]
) -> StageStores:
    """Every store that was chosen for a stage, filled. What cannot be filled is computed online: the result is the same. Collective.

    asked(where): whether somebody asked this process to stop; then nothing more is filled.
    """
    chosen, augment, made = run.choices.stages[stage.index], stage.spec.augment, StageStores()
    val = run.images.val
    if prefix is not None and chosen.train is not None and chosen.train.place is not None:
        made.train = _open(run, stage, chosen.train, "features", prefix, run.student, run.images.train, augment, asked)
    if prefix is not None and val is not None and chosen.val is not None and chosen.val.place is not None:
        made.val = _open(run, stage, chosen.val, "features", prefix, run.student, val, "none", asked)
    if teacher is not None and run.teacher is not None and chosen.teacher is not None and chosen.teacher.place is not None:
        made.teacher = _open(run, stage, chosen.teacher, "logits", teacher, run.teacher, run.images.train, augment, asked)
    return made


@contextmanager
def base_images(run: Run, asked: Callable[[str], bool]) -> Iterator[None]:
    """Inside, images are read from the store of base images where it was chosen. What cannot be filled is decoded anew. Collective."""
    with ExitStack() as held:
        if run.choices.images is not None and run.choices.images.place is not None:
            for split in (run.images.train, run.images.val):
                if split is not None:
                    _open_bases(run, split, held, asked)
        try:
            yield
        finally:
            run.bases = {}


def _open_bases(run: Run, split: Split, held: ExitStack, asked: Callable[[str], bool]) -> None:
    preprocess, choice = run.student.preprocess, run.choices.images
    assert choice is not None
    made_by = {"recipe": run.recipe.model_dump(mode="json"), "split": split.name}
    opened = _hold(run, choice, image_cache.KIND, image_cache.key(run.images.fingerprint, split.name, preprocess), made_by)
    if opened is None:
        return
    held.enter_context(opened)
    found = ImageCache(opened.path, split, preprocess)
    needed = len(split) * choice.speed.row_bytes
    why = _fill(run, opened, choice, needed, found.names(), lambda names: found.make(names, run.workers), asked)
    if why is None:
        run.bases[split.name] = found


def _fill(
    run: Run, opened: Store, choice: Choice, needed: int, names: list[str], make: Callable[[list[str]], Made], asked: Callable[[str], bool]
) -> str | None:
    """Make room for `needed` bytes, and fill. Returns None, or why the store is not whole, which is said unless somebody asked to stop.

    Collective. One process of each machine makes room: machines may have caches of their own.
    """
    runtime, root, limit = run.runtime, opened.path.parent, run.choices.budget.disk
    try:
        has_room = runtime.local_rank > 0 or disk_store.make_room(root, needed, limit, opened.path)
    except OSError:  # an error of one process would let the others wait
        has_room = False
    all_have = bool(runtime.gather(torch.tensor([int(has_room)], device=runtime.device)).min())
    why = None if all_have else f"the other stores in {root} are in use, and leave no room"
    began = clock()

    def show(where: str) -> bool:
        run.console.busy(f"cache   {choice.stage}: {choice.what}: {where}")
        return asked(where)

    why = why or feature_table.fill(runtime, opened, names, make, show)
    run.console.busy(None)
    if why is None and clock() - began > 1:
        run.console.say(f"cache   {choice.stage}: {choice.what} stand after {duration(clock() - began)}")
    if why is not None and why != feature_table.ASKED:
        run.console.say(f"cache   {choice.stage}: {choice.what} computed as they are asked for: {why}", style="yellow")
    return why


def _open(
    run: Run, stage: StagePlan, choice: Choice, kind: str, frozen: FrozenModel, loaded: Loaded, split: Split, augment: Augment,
    asked: Callable[[str], bool],
) -> Rows | None:  # fmt: skip
    """A filled store's rows, or None where it could not be filled."""
    place = choice.place
    assert place is not None
    views = run.views(split, augment)
    layout = Layout.of(len(split), choice.num_views, choice.speed.row_bytes, frozen.chunk or CHUNK["cpu"])
    key = row_key(run, kind, frozen, loaded, split, augment, choice.num_views) | {"shard_rows": layout.shard_rows}
    made_by = {"recipe": run.recipe.model_dump(mode="json"), "stage": stage.index, "run": str(run.path.absolute()), "split": split.name}
    opened = _hold(run, choice, kind, key, made_by)
    if opened is None:
        return None
    if (
        _fill(run, opened, choice, choice.num_bytes, layout.names(), lambda names: _make(run, views, layout, frozen, names, asked), asked)
        is not None
    ):
        opened.close()
        return None
    try:
        return Rows(opened, layout, place, run.runtime.device)
    except torch.OutOfMemoryError:
        run.console.say(f"cache   {choice.stage}: {choice.what} read from memory: the device has no room", style="yellow")
    return Rows(opened, layout, "memory", run.runtime.device)


def _hold(run: Run, choice: Choice, kind: str, key: dict[str, Any], made_by: dict[str, Any]) -> Store | None:
    """A store, held open by every process; None, which is said, where one of them cannot: its disk is full. Collective."""
    opened, why = None, "another process could not write"
    try:
        opened = Store(store_root(), kind, key, made_by)
    except (OSError, UserError) as error:
        why = str(error)
    if not FlagAllReduce(run.runtime, 1).sum_now([int(opened is None)])[0]:
        return opened
    if opened is not None:
        opened.close()
    run.console.say(f"cache   {choice.stage}: {choice.what} computed as they are asked for: {why}", style="yellow")
    return None


def _make(run: Run, views: Views, layout: Layout, frozen: FrozenModel, names: list[str], alive: Callable[[str], bool]) -> Made:
    """Shards in order; images come through the run's data workers, a chunk at a time."""
    chunk, device = frozen.chunk or CHUNK["cpu"], run.runtime.device
    batches: list[list[SampleRef]] = []
    for name in names:
        view, rows = layout.rows(name)
        batches += [[SampleRef(i, view) for i in rows[at : at + chunk]] for at in range(0, len(rows), chunk)]
    loaded = iter(item_loader(views, batches, run.workers, run.pins))
    for name in names:
        _, rows = layout.rows(name)
        parts = []
        for at in range(0, len(rows), chunk):
            alive(f"row {at} of shard {name}")  # for the watch; who asks to stop is heard between shards
            parts.append(frozen(to_device(next(loaded), device)["image"]))
        yield name, {"rows": torch.cat(parts).cpu()}


def row_key(run: Run, kind: str, frozen: FrozenModel, loaded: Loaded, split: Split, augment: Augment, num_views: int) -> dict[str, Any]:
    """Everything that decides a row's bytes. The evaluation view is the same whatever augments the others."""
    chain, preprocess, data = frozen.chain, run.student.preprocess, run.recipe.data
    augmented = num_views > 1 and augment != "none"
    runtime = run.runtime
    device = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"  # large nets add up in another order
    if runtime.device.type == "cuda":
        device = torch.cuda.get_device_name(runtime.device)
    return {
        "kind": kind,
        "format": FORMAT,
        "weights": frozen.fingerprint,
        "blocks": [block.name for block in chain.blocks[: frozen.stop]],
        "config": {k: v for k, v in loaded.card.config.items() if k not in ("id2label", "label2id")},
        "normalise": [list(chain.mean), list(chain.std)],
        "view": [preprocess.size, preprocess.resize, preprocess.interpolation],
        "augment": [augment, data.flip, data.seed] if augmented else None,
        "dtype": str(frozen.dtype or next(chain.parameters()).dtype),
        "chunk": frozen.chunk,
        "data": [run.images.fingerprint, split.name, len(split)],
        "device": [runtime.device.type, device, runtime.precision, run.recipe.deterministic],
        "versions": {name: version(name) for name in VERSIONS}
        | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "codecs": image_cache.codecs()},
        "products": [torch.get_float32_matmul_precision(), os.environ.get("NVIDIA_TF32_OVERRIDE"), torch.backends.cudnn.allow_tf32],
    }
