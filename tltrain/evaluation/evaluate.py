"""`tltrain evaluate`: computes the metrics of a finished run again, from its folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from tltrain.core.errors import UserError, some
from tltrain.core.recipe import Augment, Data, Recipe
from tltrain.data import DataSplits, Split
from tltrain.data.dataset import Indexed, groups_in
from tltrain.data.loader import eval_loader, eval_views_loader
from tltrain.data.sampler import Shard
from tltrain.data.splits import foreign
from tltrain.data.views import Preprocess, Views
from tltrain.distributed.out_of_memory import fitting
from tltrain.distributed.runtime import Runtime, torch_settings_kept
from tltrain.evaluation import metrics
from tltrain.evaluation.evaluator import answers, features, predict, predict_views
from tltrain.evaluation.kept_data import for_evaluation, images_for, trained_on
from tltrain.evaluation.metrics import Predictions
from tltrain.evaluation.multilabel.names import under_classes
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.evaluation.results import differs_from_test
from tltrain.models import factory
from tltrain.models.chain import Chain, on_device
from tltrain.models.metadata import read_card
from tltrain.runs import run_dir
from tltrain.runs.report.stats import accuracy_interval, gain_interval, mcnemar, sign_flips
from tltrain.uncertainty.abstain import Abstention
from tltrain.uncertainty.answers import Val
from tltrain.uncertainty.conformal import Sets
from tltrain.uncertainty.strangers import Strangers, detection_figures

OWN = {"per_class": None, "exclude": None, "relabel": None, "folds": None, "fold": None, "repeat": 0}
"""Data settings that belong to the run's own images. They are reset for another source."""


@dataclass(frozen=True)
class Asked:
    """Options of an evaluation: views per image, and rules fitted on val (`evaluation/promises`)."""

    num_views: int = 1
    sets: Sequence[Sets] = ()
    abstentions: Sequence[Abstention] = ()
    strangers: Strangers | None = None
    """Images of classes that the run does not know are then counted as strangers. None: they are refused."""
    val: Val | None = None
    """The size of val, which the usual rules are fitted on. It may be too small for any. None where the usual rules are not shown."""

    @property
    def thresholds(self) -> list[float]:
        """Of `sets`, for `evaluator.predict`."""
        return [sets.threshold for sets in self.sets]


PLAIN = Asked()


def augment_of_views(recipe: Recipe) -> Augment:
    """Augmentation for test-time views: that of the last stage which has one, or `light` (shifts, flips) for runs without.

    Views are drawn by (data.seed, 0, view) for every image, so that a prediction does not depend on the other images.
    """
    return next((stage.augment for stage in reversed(recipe.stages) if stage.augment != "none"), "light")


@torch_settings_kept()
def evaluate(path: Path, source: str | None, which: str, device_batch: int, asked: Asked = PLAIN) -> dict[str, Any]:
    """Metrics of a finished run's best weights, on its own images or on others of its classes, all of them or some.

    path: the run folder. source: a data source in place of the recipe's. which: train, val, test or all. device_batch: images at a time.
    The run's own images keep the splits of the training, and `notes` lists images that are missing, new or changed.
    Raises UserError where the run is not finished, the split does not exist, or an image's class is not one of the run.
    """
    runtime, opened = opened_run(path, source, which, strangers=asked.strangers is not None)
    if opened.spec.multilabel:
        return _labels_figures(path, runtime, opened, source, device_batch)

    def predicted(batch: int) -> tuple[Predictions, Predictions]:
        batches = opened.loader(runtime, opened.split, batch, asked.num_views)
        if asked.num_views > 1:
            return predict_views(runtime, opened.chain, batches, asked.num_views, opened.temperature, asked.thresholds)
        alone = predict(runtime, opened.chain, batches, opened.temperature, thresholds=asked.thresholds)
        return alone, alone

    # With several processes, one that runs out of memory cannot retry without the others.
    predictions, alone = fitting(predicted, device_batch)[0] if runtime.world == 1 else predicted(device_batch)
    group_N = groups_in(opened.images, opened.split)
    predictions, notes = metrics.in_groups(replace(predictions, present=opened.present), group_N), opened.notes
    figures = metrics.summary(predictions, len(opened.classes))
    top1 = accuracy_interval(predictions.predicted == predictions.label, predictions.group)
    if source is None and opened.split.name == "test" and not notes and asked.num_views == 1:
        notes = differs_from_test(path, figures)
    return {
        "split": opened.split.name,
        **figures,
        "top1_low": top1.low,
        "top1_high": top1.high,
        **metrics.details(predictions, opened.classes, opened.recipe.data.depth),
        **metrics.doubts(predictions, asked.sets, asked.abstentions, opened.classes, asked.val),
        **({} if asked.num_views == 1 else {"views": _gain(asked.num_views, alone, predictions)}),
        **({} if asked.strangers is None else {"strangers": _stranger_figures(runtime, opened, asked.strangers, device_batch)}),
        "notes": notes,
    }


def _labels_figures(path: Path, runtime: Runtime, opened: Opened, source: str | None, device_batch: int) -> dict[str, Any]:
    """`evaluate` of several labels an image."""

    def predicted(batch: int) -> LabelPredictions:
        return cast(LabelPredictions, answers(runtime, opened.chain, opened.loader(runtime, opened.split, batch), opened.temperature))

    predictions = fitting(predicted, device_batch)[0] if runtime.world == 1 else predicted(device_batch)
    predictions = cast(LabelPredictions, metrics.with_groups(predictions, groups_in(opened.images, opened.split), opened.thresholds))
    figures, notes = metrics.summary(predictions, len(opened.classes)), opened.notes
    right = accuracy_interval((predictions.named == predictions.target).all(1), predictions.group)
    if source is None and opened.split.name == "test" and not notes:
        notes = differs_from_test(path, figures, "subset_accuracy")
    ends = {"subset_low": right.low, "subset_high": right.high}
    return {"split": opened.split.name, **figures, **ends, **metrics.details(predictions, opened.classes), "notes": notes}


@dataclass(frozen=True)
class Opened:
    """A finished run and the images that it is asked about."""

    recipe: Recipe
    images: DataSplits
    """As their source gives them. Labels index the source's own classes."""
    classes: tuple[str, ...]
    """Of the network."""
    split: Split
    """The images with a class of the run. Labels index `classes`."""
    strange: Split | None
    """The others. None if there are none."""
    present: np.ndarray | None
    """The classes that have images. None if all have, and for the run's own images."""
    chain: Chain
    """Frozen, in eval mode, on the device."""
    head: str
    """Path of the classifier in the chain's net."""
    spec: Data
    preprocess: Preprocess
    temperature: float
    thresholds: tuple[float, ...] | None
    """Of several labels: the calibrated probability from which each class is named."""
    notes: list[str]

    def views(self, split: Split, num_views: int = 1) -> Views:
        """The evaluation view of each image, and for several views also the others of `augment_of_views`."""
        if num_views == 1:
            return Views(split, self.preprocess, "none", self.spec.flip, self.spec.seed)
        same = replace(split, source_index=np.zeros(len(split), np.int64))
        return Views(same, self.preprocess, augment_of_views(self.recipe), self.spec.flip, self.spec.seed)

    def loader(self, runtime: Runtime, split: Split, batch: int, num_views: int = 1, limit: int | None = None) -> Any:
        """The views of a split for this process. limit: images at most, spread over the split, beside the recipe's `eval_limit`."""
        most = min((n for n in (self.spec.eval_limit, limit) if n is not None), default=None)
        where = Shard(runtime.rank, runtime.world), batch, most, 0, runtime.device.type == "cuda"
        views = self.views(split, num_views)
        return eval_loader(views, *where) if num_views == 1 else eval_views_loader(views, num_views, *where)


def opened_run(path: Path, source: str | None, which: str, strangers: bool = False) -> tuple[Runtime, Opened]:
    """Open a finished run with its images, or with those of another source. Arguments and errors are those of `evaluate`.

    strangers: whether another source may hold images of classes that the run does not know.
    Call it inside `torch_settings_kept`.
    """
    recipe = run_dir.read_recipe(path)
    card = read_card(run_dir.finished_weights(path))
    whole = {"val_fraction": 0.0, "test_fraction": 0.0} if which == "all" else {}  # what is not split may be of one image a class
    unknown = {} if source is None else foreign(source)
    spec = recipe.data if source is None else recipe.data.model_copy(update={"source": source, **OWN, **unknown, **whole})
    drawn = images_for(spec, path, other=source is not None)
    images, notes = for_evaluation(path, drawn) if source is None else (drawn, trained_on(path, drawn, spec, which))
    part, classes = ByClass(_choose(images, which)), images.classes
    if source is not None and card is not None and card.classes is not None:
        classes = card.classes
        part = by_class(part.known, images.classes, classes, strangers)
    runtime = Runtime(recipe.deterministic)
    loaded = factory.load(
        recipe.backbone.model_copy(update={"weights": str(path)}), classes=classes,
        size=spec.size, resize=spec.resize, head="keep", seed=recipe.seed,
    )  # fmt: skip
    chain = on_device(loaded.chain.freeze(len(loaded.chain.blocks), norm_stats=False), runtime.device).eval()  # as the run's own test does
    return runtime, Opened(
        recipe, images, classes, part.known, part.strange, part.present, chain, loaded.family.head_of(loaded.card),
        spec, loaded.preprocess, loaded.card.temperature, loaded.card.thresholds, [*notes, *part.notes],
    )  # fmt: skip


@dataclass(frozen=True)
class ByClass:
    """The images of a split whose class the run knows, with the run's class numbers, and the others."""

    known: Split
    strange: Split | None = None
    present: np.ndarray | None = None
    notes: Sequence[str] = ()


def by_class(split: Split, theirs: Sequence[str], classes: Sequence[str], strangers: bool) -> ByClass:
    """Sort the images of a split by whether the run knows their class. Classes are matched by name; their order does not matter.

    theirs: the class names that the split's labels count. classes: the run's. strangers: whether images of other classes may occur.
    Raises UserError if they occur and may not, or if no image has a class of the run.
    """
    if split.labels.ndim == 2:
        labels_NK, notes = under_classes(split.labels, theirs, classes)
        return ByClass(replace(split, labels=labels_NK), notes=notes)
    number_of = {name: k for k, name in enumerate(classes)}
    label_N = np.array([number_of.get(name, -1) for name in theirs], dtype=np.int64)[split.labels]
    unknown = [name for k, name in enumerate(theirs) if name not in number_of and (split.labels == k).any()]
    if unknown and not strangers:
        raise UserError(
            f"{(label_N < 0).sum():,} images are of classes that the run does not know: {some(unknown)}; leave them out, or count them as "
            f"strangers with --strangers. Its classes: {some(list(classes))}"
        )
    if not (label_N >= 0).any():
        raise UserError(f"no image is of a class of the run; its classes: {some(list(classes))}")
    known, strange = (replace(_part(split, at), labels=label_N[at]) for at in (np.flatnonzero(label_N >= 0), np.flatnonzero(label_N < 0)))
    present, notes = np.unique(known.labels), list[str]()
    missing = [name for k, name in enumerate(classes) if k not in present]
    if missing:
        notes.append(
            f"{len(missing)} of the run's {len(classes)} classes have no image here: {some(missing)}; means over classes go over the other "
            f"{len(present)}. The network may still answer with any class"
        )
    if unknown:
        notes.append(f"{len(strange):,} images are of classes that the run does not know, and count as strangers: {some(unknown)}")
    return ByClass(known, strange if unknown else None, present if missing else None, notes)


def _part(split: Split, positions: np.ndarray) -> Split:
    ids = tuple(split.ids[i] for i in positions.tolist())
    return replace(
        split, labels=split.labels[positions], ids=ids, source_index=split.source_index[positions], read=Indexed(split.read, positions)
    )


def _stranger_figures(runtime: Runtime, opened: Opened, strangers: Strangers, batch: int) -> dict[str, Any]:
    """How well strangers are detected: counts among images of the run's classes and among the others, AUROC, FPR95."""

    def strangeness(split: Split | None) -> np.ndarray | None:
        return (
            None if split is None else strangers.score(features(runtime, opened.chain, opened.head, opened.loader(runtime, split, batch)))
        )

    return detection_figures(strangeness(opened.split), strangeness(opened.strange))


def _gain(num_views: int, alone: Predictions, together: Predictions) -> dict[str, Any]:
    """Accuracy with several views minus accuracy with view 0, on the same images, with interval and test."""
    one_N, all_N = alone.predicted == alone.label, together.predicted == together.label
    if together.group is None:
        only_one, only_all, p = mcnemar(one_N, all_N)
    else:
        only_one, only_all, p = sign_flips(one_N, all_N, group_N=together.group)
    value, low, high = gain_interval(one_N, all_N, together.group)
    difference = {"difference": value, "interval": [low, high]}
    alone_top1 = float(one_N.mean())
    return {"num": num_views, "top1_of_one": alone_top1, **difference, "only_one_right": only_one, "only_all_right": only_all, "p": p}


class NoSplit(UserError):
    """The images have no split of that name."""


def _choose(images: DataSplits, which: str) -> Split:
    splits = [s for s in (images.train, images.val, images.test) if s is not None]
    if which != "all":
        split = next((s for s in splits if s.name == which), None)
        if split is None:
            raise NoSplit(f"there is no {which} split; there are {', '.join(s.name for s in splits)}, or all")
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
