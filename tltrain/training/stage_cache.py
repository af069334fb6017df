"""The caches of one stage: opens them, fills missing rows, and adds cached rows to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tltrain.cache.cost_model import Choice
from tltrain.cache.feature_table import Rows
from tltrain.cache.filling import CacheFiller
from tltrain.cache.frozen import FrozenModel
from tltrain.cache.image_cache import PartOfCache
from tltrain.cache.keys import CacheContext
from tltrain.core.stage_plan import StagePlan
from tltrain.data import Split
from tltrain.data.dataset import SharedImages
from tltrain.data.views import Batch
from tltrain.models.factory import Loaded
from tltrain.training.setup import Run


@dataclass
class StageStores:
    """The cached rows of a stage. None: computed on the fly."""

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
    """Batches with cached rows added. Can be iterated more than once."""

    batches: Iterable[Batch]
    rows: dict[str, Rows] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield {**batch, **{name: rows(batch["position"], batch["view"]) for name, rows in self.rows.items()}}


def open_stores(
    run: Run, stage: StagePlan, prefix: FrozenModel | None, teacher: FrozenModel | None, should_stop: Callable[[str], bool]
) -> StageStores:
    """Open and fill the caches that were chosen for a stage. Collective.

    A cache that cannot be filled is left out. Its rows are computed on the fly, with the same result.
    should_stop(where): whether a stop is requested. Filling ends then.
    """
    chosen, stores, train, val = run.choices.stages[stage.index], StageStores(), run.images.drawn(stage.taught), run.images.val
    stage_origin = {"stage": stage.index, "run": str(run.path.absolute())}
    shared = stage.shares_features(run.images.shared)

    def rows(choice: Choice, kind: str, frozen: FrozenModel, loaded: Loaded, split: Split, of: StagePlan | None) -> Rows | None:
        filler = _filler(run, should_stop, split)
        return filler.rows(choice, kind, frozen, loaded, run.views(split, of), _origin(run, split) | stage_origin)

    def of_train(choice: Choice, kind: str, frozen: FrozenModel, loaded: Loaded, shared: SharedImages | None) -> Rows | None:
        """The rows of train, which of folds stand among those of all images."""
        if shared is None:
            return rows(choice, kind, frozen, loaded, train, stage)
        of_all = rows(choice, kind, frozen, loaded, shared.split, stage)
        return of_all and of_all.part(shared.positions(train))

    if prefix is not None and chosen.train is not None and chosen.train.place is not None:
        stores.train = of_train(chosen.train, "features", prefix, run.student, shared)
        if stores.train is not None and shared is not None and val is not None:
            stores.val = stores.train.part(shared.positions(val))  # view 0 is the evaluation view, whatever the augmentation
    if prefix is not None and val is not None and chosen.val is not None and chosen.val.place is not None:
        stores.val = rows(chosen.val, "features", prefix, run.student, val, None)
    if teacher is not None and run.teacher is not None and chosen.teacher is not None and chosen.teacher.place is not None:
        kind = "logits" if stage.features is None else "teacher"
        stores.teacher = of_train(chosen.teacher, kind, teacher, run.teacher, stage.shares(run.images.shared))
    return stores


@contextmanager
def base_images(run: Run, should_stop: Callable[[str], bool]) -> Iterator[None]:
    """Within the context, images are read from the image cache if it was chosen. A cache that cannot be filled is not used. Collective."""
    with ExitStack() as opened:
        if (choice := run.choices.images) is not None and choice.place is not None:
            shared = run.images.shared
            for split in (run.images.pool, run.images.val) if shared is None else (shared.split,):
                filled = None if split is None else _filler(run, should_stop, split).images(choice, split, _origin(run, split))
                if split is not None and filled is not None:
                    opened.enter_context(filled[0])
                    run.bases[split.name] = filled[1]
                    if split is run.images.pool:  # train stands first in it
                        run.bases.setdefault(run.images.train.name, PartOfCache(filled[1], np.arange(len(run.images.train))))
                    if shared is not None:
                        parts = [part for part in (run.images.train, run.images.val, run.images.test) if part is not None]
                        run.bases |= {part.name: PartOfCache(filled[1], shared.positions(part)) for part in parts}
        try:
            yield
        finally:
            run.bases = {}


def _filler(run: Run, should_stop: Callable[[str], bool], split: Split) -> CacheFiller:
    runtime = run.runtime
    context = CacheContext.of(run.recipe, run.images, run.student.preprocess, runtime.device, runtime.precision)
    context = replace(context, fingerprint=run.images.fingerprint_of(split))
    return CacheFiller(context, runtime, run.console, run.workers, run.choices.budget.disk, should_stop)


def _origin(run: Run, split: Split) -> dict[str, Any]:
    """Metadata kept with a cache. `tltrain cache verify` needs it to compute the rows again."""
    return {"recipe": run.recipe.model_dump(mode="json"), "split": split.name}
