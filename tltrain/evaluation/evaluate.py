"""`tltrain evaluate`: computes the metrics of a finished run again, from its folder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, Split, open_images
from tltrain.data.loader import eval_loader
from tltrain.data.sampler import Shard
from tltrain.data.views import Preprocess, Views
from tltrain.distributed.out_of_memory import fitting
from tltrain.distributed.runtime import Runtime, torch_settings_kept
from tltrain.evaluation import metrics
from tltrain.evaluation.evaluator import predict
from tltrain.evaluation.kept_data import for_evaluation
from tltrain.evaluation.metrics import Predictions
from tltrain.models import factory
from tltrain.models.chain import Chain, on_device
from tltrain.runs import run_dir

OWN = {"per_class": None, "exclude": None, "relabel": None}
"""What a recipe says of its own images, and not of another source."""
ROUNDING = 0.002
"""Largest share of images whose prediction may change with the device or the precision."""


@torch_settings_kept()
def evaluate(path: Path, source: str | None, which: str, device_batch: int) -> dict[str, Any]:
    """Metrics of a finished run's best weights, on its own images or on others with the same classes.

    path: the run folder. source: a data source in place of the recipe's. which: train, val, test or all. device_batch: images at a time.
    The run's own images keep the splits of the training, and `notes` lists images that are missing, new or changed.
    Raises UserError where the run is not finished or the split does not exist.
    """
    runtime, opened = opened_run(path, source, which)
    images, split, chain, spec, notes = opened.images, opened.split, opened.chain, opened.spec, opened.notes
    views = Views(split, opened.preprocess, "none", spec.flip, spec.seed)

    def predicted(batch: int) -> Predictions:
        batches = eval_loader(views, Shard(runtime.rank, runtime.world), batch, spec.eval_limit, 0, runtime.device.type == "cuda")
        return predict(runtime, chain, batches, opened.temperature)

    # With several processes, one that runs out of memory cannot retry without the others.
    predictions = fitting(predicted, device_batch)[0] if runtime.world == 1 else predicted(device_batch)
    figures = metrics.summary(predictions, len(images.classes))
    if source is None and split.name == "test" and not notes:
        notes = _differs_from_test(path, figures)
    return {
        "split": split.name,
        **figures,
        **metrics.details(predictions, images.classes),
        "notes": notes,
    }


@dataclass(frozen=True)
class Opened:
    """A finished run and the images that it is asked about."""

    images: DataSplits
    split: Split
    chain: Chain
    """Frozen, in eval mode, on the device."""
    spec: Data
    preprocess: Preprocess
    temperature: float
    notes: list[str]


def opened_run(path: Path, source: str | None, which: str) -> tuple[Runtime, Opened]:
    """Open a finished run with its images, or with those of another source. Arguments and errors are those of `evaluate`.

    Call it inside `torch_settings_kept`.
    """
    recipe = run_dir.read_recipe(path)
    run_dir.finished_weights(path)
    spec = recipe.data if source is None else recipe.data.model_copy(update={"source": source, **OWN})
    drawn = open_images(spec)
    images, notes = for_evaluation(path, drawn) if source is None else (drawn, list[str]())
    runtime = Runtime(recipe.deterministic)
    loaded = factory.load(
        recipe.backbone.model_copy(update={"weights": str(path)}), classes=images.classes,
        size=spec.size, resize=spec.resize, head="keep", seed=recipe.seed,
    )  # fmt: skip
    split = _choose(images, which)
    chain = on_device(loaded.chain.freeze(len(loaded.chain.blocks), norm_stats=False), runtime.device).eval()  # as the run's own test does
    return runtime, Opened(images, split, chain, spec, loaded.preprocess, loaded.card.temperature, notes)


def _differs_from_test(path: Path, figures: Mapping[str, Any]) -> list[str]:
    """A note if the accuracy on the same images differs from the run's own test by more than rounding."""
    earlier = run_dir.test_metrics(path)
    if earlier is None:
        return []
    n = figures["n"]
    right, was_right = (round(test["top1"] * test["n"]) for test in (figures, earlier))
    if n == earlier["n"] and abs(right - was_right) <= max(1, ROUNDING * n):
        return []
    return [
        f"the run's own test had {was_right:,} of {earlier['n']:,} right, and this evaluation has {right:,} of {n:,} on the same images: "
        "the weights, the device, the precision or the package versions have changed since"
    ]


def _choose(images: DataSplits, which: str) -> Split:
    splits = [s for s in (images.train, images.val, images.test) if s is not None]
    if which != "all":
        split = next((s for s in splits if s.name == which), None)
        if split is None:
            raise UserError(f"there is no {which} split; there are {', '.join(s.name for s in splits)}, or all")
        return split
    labels, source_index = np.concatenate([s.labels for s in splits]), np.concatenate([s.source_index for s in splits])
    ids = tuple(i for s in splits for i in s.ids)
    return replace(images.train, name="all", labels=labels, source_index=source_index, ids=ids, read=_Joined(splits))


@dataclass(frozen=True)
class _Joined:
    """Reads samples of several splits, concatenated. A position counts over all of them."""

    splits: Sequence[Split]

    def __call__(self, position: int) -> Any:
        for split in self.splits:
            if position < len(split.labels):
                return split.read(position)
            position -= len(split.labels)
        raise IndexError(position)
