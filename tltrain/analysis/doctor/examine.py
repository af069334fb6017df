"""Examines the images of a recipe: pixels first, then, with a network, what its features say of copies, labels and outliers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from torch import Tensor

from tltrain.analysis.doctor import labels, looks, twins
from tltrain.analysis.doctor.copies import Leak, copies, leak
from tltrain.analysis.doctor.findings import Finding, settled
from tltrain.analysis.doctor.looks import Look
from tltrain.analysis.doctor.twins import Twin
from tltrain.analysis.features import FeatureBank
from tltrain.analysis.samples import EVERY, Samples, samples_of
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.data import open_images

SIZE = 224
"""Side that tiny images are measured by where no network says it."""
FEW = 300
"""Below so many images data workers take longer to start than they save."""
SHOWN = 500
"""Images between two words on how far the doctor is."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of the checks."""

    source: str
    backbone: str | None
    """None: only pixels were looked at."""
    classes: tuple[str, ...]
    splits: dict[str, int]
    """Images of each split."""
    labels: tuple[str, ...]
    """(N,) the class of each image, or its set of labels."""
    findings: tuple[Finding, ...]
    """By problem, the surest first."""
    leak: Leak | None
    """None without a network, and where no test image has a near-duplicate in train."""
    notes: tuple[str, ...]
    """What was said when the images were opened, and what could not be done."""
    read: Callable[[int], Image.Image]
    """The image at a position among those that were looked at."""
    several: bool = False
    """Whether an image may have several labels."""

    @property
    def num(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class _Reader:
    samples: Samples

    def __call__(self, position: int) -> Image.Image:
        assert self.samples.images.source is not None
        return self.samples.images.source.read(int(self.samples.numbers[position]))


def examine(recipe: Recipe, flags: RunFlags, console: Console, with_network: bool) -> Diagnosis:
    """Look at every image of a recipe, in every split. with_network: whether its backbone is asked too. Raises UserError."""
    images = open_images(recipe.data)
    samples = samples_of(images, EVERY)
    read, features_ND, size, name = _Reader(samples), None, recipe.data.size or SIZE, None
    if with_network:
        flags = replace(flags, workers=0) if flags.workers is None and len(samples) < FEW else flags
        with FeatureBank.open(recipe, flags, console, images=images, which=EVERY) as bank:
            features_ND, size, name = bank.features(), bank.loaded.preprocess.size, bank.loaded.card.name
    seen = _look(read, len(samples), console)
    console.busy("near-duplicates")
    pairs, cut = twins.twins(seen, read, range(len(samples)), features_ND)
    pairs = [*pairs, *_identical(samples, pairs)]
    cluster_N = twins.clusters(len(samples), ((pair.first, pair.second) for pair in pairs))
    found = looks.pixel_problems(seen, samples.ids, size) + copies(samples, seen, pairs, cluster_N)
    notes, leaked = list(images.notes), None
    if (num_tiny := int(looks.tiny(seen, size).sum())) * 2 > len(samples):
        notes.append(
            f"{num_tiny:,} of {len(samples):,} images have a quarter of the {size} pixels that the network sees, or fewer: set data.size"
        )
    if cut:
        notes.append(f"more than {twins.MOST_PAIRS:,} pairs of images resemble each other; only the nearest were compared by their pixels")
    if features_ND is not None:
        console.busy("labels and outliers")
        found += _by_features(samples, features_ND, cluster_N, recipe.data.seed)
        leaked = leak(samples, cluster_N, features_ND, recipe.data.seed)
    console.busy(None)
    splits = {split.name: len(split) for split in samples.splits}
    label_N = tuple(name or "no label" for name in samples.label_names)
    kept = tuple(settled(found))
    return Diagnosis(recipe.data.source, name, samples.classes, splits, label_N, kept, leaked, tuple(notes), read, samples.several)


def _look(read: Callable[[int], Image.Image], num: int, console: Console) -> list[Look]:
    seen = []
    for i, each in enumerate(looks.look_at(read, range(num))):
        if i % SHOWN == 0:
            console.busy(f"pixels: image {i + 1:,} of {num:,}")
        seen.append(each)
    return seen


def _identical(samples: Samples, pairs: Sequence[Twin]) -> list[Twin]:
    """Byte-identical images that are not among the pairs yet, each with the first of its kind."""
    known, first, found = {(pair.first, pair.second) for pair in pairs}, dict[str, int](), []
    for i, digest in enumerate(samples.digests):
        j = first.setdefault(digest, i)
        if j != i and (j, i) not in known:
            found.append(Twin(j, i, 1.0))
    return found


def _by_features(samples: Samples, features_ND: Tensor, cluster_N: np.ndarray, seed: int) -> list[Finding]:
    """Wrong labels and outliers. Near-duplicates, and images of one group of the data, do not vouch for each other."""
    first: dict[int, int] = {}
    together = [(first.setdefault(group, i), i) for i, group in enumerate(samples.groups.tolist())]
    group_N = twins.clusters(len(samples), [*together, *enumerate(cluster_N.tolist())])
    if len(np.unique(group_N)) < 2:
        return []
    flat_ND = labels.flattened(features_ND)
    p_NK = labels.unseen_probabilities(flat_ND, samples.labels, group_N, len(samples.classes), seed)
    doubtful = labels.wrong_sets if samples.several else labels.wrong_labels
    found = doubtful(p_NK, samples.labels, samples.ids, samples.classes)
    return found + labels.outliers(labels.strangeness(flat_ND, samples.labels, group_N), samples.ids)
