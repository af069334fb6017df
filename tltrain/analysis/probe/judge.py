"""Compares backbones, and cuts through them, by cross-validated heads solved on their features: no head has seen the image it predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tltrain.analysis.at_hand import Candidate
from tltrain.analysis.features import FeatureBank
from tltrain.analysis.samples import EVERY, WITHOUT_TEST, Samples, samples_of
from tltrain.cache.measure import time_frozen
from tltrain.core import recipe as recipes
from tltrain.core.errors import UserError, some
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console, clock
from tltrain.core.recipe import Recipe
from tltrain.data import class_counts, open_images
from tltrain.data.splits import folds
from tltrain.evaluation.multilabel.judged import Judged, by_logits
from tltrain.heads.neighbours import neighbours
from tltrain.heads.out_of_fold import out_of_fold
from tltrain.heads.solve import Kind

NEIGHBOURS = 5
MANY = 2000
"""From this many images on the default is 5 folds. Below it is 10: a head trained without a fifth of few images is clearly worse."""


@dataclass(frozen=True)
class Ask:
    """What is probed, and how."""

    source: str
    """As `data.source` of a recipe."""
    cuts: tuple[str, ...] = ("head",)
    k: int | None = None
    """Folds. None: 10, and 5 from MANY images on."""
    head: Kind = "ridge"
    size: int | None = None
    """Side of the images, pixels. None: that of the weights."""
    resize: int | None = None
    """Shorter side before the crop, pixels. None: the weights' own ratio of it to the size."""
    seed: int = 0
    """Deals the folds. The splits are those of a recipe with its default data.seed."""
    everything: bool = False
    """Whether test images are used too."""
    per_class: int | None = None
    """Images of each class at most, of train alone. None: all of train and val."""
    label_separator: str | None = None
    """As data.label_separator of a recipe: an image may have several labels, and figures are mean average precision."""
    label_columns: tuple[str, ...] | None = None
    """As data.label_columns."""

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.label_separator is not None or self.label_columns is not None


@dataclass(frozen=True)
class ProbeRow:
    """One backbone up to one cut. Shares are of all images that were looked at, intervals of 95 %."""

    backbone: str
    weights: str | None
    cut: str
    accuracy: float
    """Of the solved head, each image judged by one that never saw its fold. Of several labels: mean average precision."""
    low: float
    high: float
    difference: float
    """Accuracy minus that of the best row, with the paired interval below. 0 for the best row."""
    difference_low: float
    difference_high: float
    neighbours: float
    """Accuracy of the vote of the 5 nearest images of other folds, by cosine."""
    image_s: float
    """Seconds of one image in the network up to the cut, measured here."""
    num_parameters: int
    """Of the network up to the cut."""
    num_features: int
    row_bytes: int
    """Bytes of the store for an image. 0 where features cannot be stored."""
    solve_s: float
    """Seconds after the features are computed: all heads of all folds, and the neighbours."""
    judged: Judged = field(repr=False, compare=False)
    """All answers of the solved head, to set it beside those of another row."""

    @property
    def right(self) -> tuple[bool, ...]:
        """(N,) whether each image was right: of several labels, all of them."""
        return tuple(self.judged.right.tolist())

    @property
    def name(self) -> str:
        return self.backbone if self.cut == "head" else f"{self.backbone} before {self.cut}"

    @property
    def as_good(self) -> bool:
        """Whether the best row may be better by chance alone."""
        return self.difference_high >= 0


@dataclass(frozen=True)
class Probed:
    """Rows, the best first, and what could not be probed."""

    ask: Ask
    """With the number of folds that were made."""
    rows: tuple[ProbeRow, ...]
    problems: dict[str, str]
    """Backbone, or backbone and cut, to what is wrong with it."""
    notes: tuple[str, ...]
    num_images: int
    num_classes: int
    baseline: float
    """The share of the most frequent class. Of several labels: the mean frequency of a label, mAP of a random order."""

    @property
    def knee(self) -> ProbeRow:
        """The fastest row among those whose accuracy is not clearly below the best."""
        return min((row for row in self.rows if row.as_good), key=lambda row: row.image_s)


def recipe_of(ask: Ask, candidate: Candidate) -> Recipe:
    """The recipe that the features belong to. Training with the same data and backbone reads the same stores. Raises UserError."""
    stage = {"name": "head", "unfreeze": "head", "steps": 1, "lr": 1e-3, "views": 1}
    raw = {
        "name": "probe",
        "data": {
            "source": ask.source,
            "size": ask.size,
            "resize": ask.resize,
            "per_class": ask.per_class,
            "label_separator": ask.label_separator,
            "label_columns": ask.label_columns,
        },
        "backbone": candidate.spec.model_dump(mode="json"),
        "batch": 64,
        "stages": [stage],
    }
    return recipes.validate(raw, "probe")


def probe(
    ask: Ask, candidates: Sequence[Candidate], flags: RunFlags, console: Console, known_problems: Mapping[str, str] | None = None
) -> Probed:
    """Cross-validate a solved head for each candidate at each cut. One that cannot be opened is listed among the problems.

    known_problems: backbones that were ruled out before, name to reason.
    Raises UserError for data that cannot be judged, and where no candidate can.
    """
    if not candidates:
        raise UserError("no backbone is named, and none is at hand; name some with --backbones")
    if ask.several and ask.head == "nearest_mean":
        raise UserError("--head is nearest_mean, which is of one class an image; of several labels take ridge or logistic")
    images = open_images(recipe_of(ask, candidates[0]).data)
    samples = samples_of(images, which_of(ask))
    usual = min(10 if len(samples) < MANY else 5, len(np.unique(samples.groups)))
    ask = replace(ask, k=usual if ask.k is None else ask.k)
    notes = [*images.notes, *_notes(ask, samples)]
    assert ask.k is not None
    fold_N = folds(samples.labels, samples.groups, ask.k, ask.seed)
    for note in notes:
        console.say(f"data    {note}", style="yellow")
    rows: list[ProbeRow] = []
    problems = dict(known_problems or {})
    for candidate in candidates:
        try:
            with FeatureBank.open(recipe_of(ask, candidate), flags, console, images=images, which=which_of(ask)) as bank:
                for cut in ask.cuts:
                    _add_row(ask, candidate, bank, cut, fold_N, rows, problems, console)
        except UserError as error:
            _add_problem(candidate.name, error, problems, console)
    if not rows:
        raise UserError("no backbone could be probed:\n" + "\n".join(f"  {name}: {why}" for name, why in problems.items()))
    count_K = class_counts(samples.labels, len(samples.classes))
    baseline = float((count_K[count_K > 0].mean() if ask.several else count_K.max()) / len(samples))
    return Probed(ask, _ranked(rows), problems, tuple(notes), len(samples), len(samples.classes), baseline)


def which_of(ask: Ask) -> tuple[str, ...]:
    """The names of the splits that are looked at."""
    return EVERY if ask.everything else WITHOUT_TEST if ask.per_class is None else ("train",)


def _add_row(
    ask: Ask, candidate: Candidate, bank: FeatureBank, cut: str, fold_N: np.ndarray, rows: list[ProbeRow], problems: dict[str, str],
    console: Console,
) -> None:  # fmt: skip
    try:
        row = _row(ask, candidate, bank, cut, fold_N)
    except UserError as error:
        _add_problem(f"{candidate.name} before {cut}" if len(ask.cuts) > 1 else candidate.name, error, problems, console)
        return
    rows.append(row)
    said = f"mAP {100 * row.accuracy:.1f} %" if ask.several else f"{100 * row.accuracy:.1f} % right"
    console.say(f"probed  {row.name}: {said}, {1000 * row.image_s:.1f} ms an image")


def _add_problem(name: str, error: UserError, problems: dict[str, str], console: Console) -> None:
    problems[name] = str(error)
    console.say(f"left    {name}: {error}", style="yellow")


def _notes(ask: Ask, samples: Samples) -> list[str]:
    """Notes on the images."""
    notes = []
    if ask.per_class is not None:
        notes.append(f"{len(samples):,} images of train are looked at, at most {ask.per_class:,} of each class")
    elif not ask.everything and samples.images.test is not None:
        left = len(samples.images.test)
        notes.append(f"{len(samples):,} images of train and val are looked at; the {left:,} of test stay unseen (--all takes them too)")
    count_K = class_counts(samples.labels, len(samples.classes))
    few = [f"{name} ({n})" for name, n in zip(samples.classes, count_K.tolist(), strict=True) if n < (ask.k or 0)]
    if few:
        notes.append(f"classes with fewer images than the {ask.k} folds, of which not every fold asks: {some(few)}")
    return notes


def _row(ask: Ask, candidate: Candidate, bank: FeatureBank, where: str, fold_N: np.ndarray) -> ProbeRow:
    """One row, compared with nothing yet."""
    cut, num_classes = bank.cut(where), len(bank.classes)
    features_ND = bank.features(cut)
    began = clock()
    logits_NK = out_of_fold(ask.head, features_ND, bank.labels, fold_N, num_classes, group_N=grouped(bank), seed=ask.seed)
    near_NK = neighbours(features_ND, bank.labels, num_classes, NEIGHBOURS, fold_N=fold_N)
    judged = by_logits(logits_NK.numpy(), bank.labels, grouped(bank))
    near = by_logits(near_NK.numpy(), bank.labels, resamples=0).value
    solve_s = clock() - began
    chain = bank.loaded.chain
    frozen = replace(bank.frozen(cut), stop=None) if chain.runs_whole else bank.frozen(cut)
    image_s, row_bytes = time_frozen(frozen, bank.loaded.preprocess.size, bank.runtime.device)
    return ProbeRow(
        candidate.name, candidate.spec.weights, where, *judged.interval, 0.0, 0.0, 0.0, near, image_s,
        sum(p.numel() for i in range(cut) for _, p in chain.parameters_of(i)), features_ND.shape[1],
        0 if chain.runs_whole else row_bytes, solve_s, judged,
    )  # fmt: skip


def grouped(samples: Samples) -> np.ndarray | None:
    """The groups (N,), or None where each image stands alone."""
    return None if len(np.unique(samples.groups)) == len(samples) else samples.groups


def _ranked(rows: Sequence[ProbeRow]) -> tuple[ProbeRow, ...]:
    """The rows from the best to the worst, of equals the quicker first, each with its difference from the best on the same images."""
    ranked = sorted(rows, key=lambda row: (-row.accuracy, row.image_s))
    compared = ranked[:1]
    for row in ranked[1:]:
        difference, low, high = row.judged.lead(ranked[0].judged)
        compared.append(replace(row, difference=difference, difference_low=low, difference_high=high))
    return tuple(compared)
