"""Treatment of near-duplicates: which copy of each picture to keep, and the effect of copies across splits on the test accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tltrain.analysis.doctor.findings import IDENTICAL, TWIN, TWIN_LABELS, TWIN_SPLITS, Finding
from tltrain.analysis.doctor.looks import Look
from tltrain.analysis.doctor.twins import Twin
from tltrain.analysis.samples import Samples
from tltrain.data.tables.corrections import EXCLUDE, LOOK
from tltrain.evaluation.multilabel.judged import by_logits
from tltrain.heads.solve import solve

_FIRST = {"test": 0, "val": 1, "train": 2}
"""The image that stays is one of test before one of train: a copy in train is what a network should not have seen."""


@dataclass(frozen=True)
class Leak:
    """The effect of near-duplicates of training images on the accuracy, or of several labels on mAP, of a ridge head solved on train."""

    num_test: int
    num_leaked: int
    """Test images that have a near-duplicate in train."""
    accuracy: float
    """On all test images. Of several labels mAP, as the next."""
    accuracy_without: float
    """On those without a near-duplicate in train. NaN if there are none."""


def copies(samples: Samples, looks: Sequence[Look], pairs: Sequence[Twin], cluster_N: np.ndarray) -> list[Finding]:
    """A finding for each image that is a copy of one that stays, and for pairs under two classes.

    pairs: near-duplicates, byte-identical images among them. cluster_N: the connected images, as `clusters` numbers them.
    """
    similarity = {(pair.first, pair.second): pair.similarity for pair in pairs}
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in sorted({i for pair in pairs for i in (pair.first, pair.second)}):
        members[int(cluster_N[i]), int(samples.label_numbers[i])].append(i)
    best: dict[int, float] = defaultdict(float)
    for pair in pairs:
        for i in (pair.first, pair.second):
            best[i] = max(best[i], pair.similarity)
    found = []
    for same in members.values():
        stays, *others = sorted(same, key=lambda i: (_FIRST[samples.split_names[i]], -looks[i].size[0] * looks[i].size[1], samples.ids[i]))
        for i in others:
            score = similarity.get((min(i, stays), max(i, stays)), best[i])
            found.append(Finding(samples.ids[i], _kind(samples, i, stays), EXCLUDE, score, samples.ids[stays], i, stays))
    return found + _two_labels(samples, pairs)


def _kind(samples: Samples, i: int, stays: int) -> str:
    if samples.split_names[i] != samples.split_names[stays]:
        return TWIN_SPLITS
    return IDENTICAL if samples.digests and samples.digests[i] == samples.digests[stays] else TWIN


def _two_labels(samples: Samples, pairs: Sequence[Twin]) -> list[Finding]:
    """The most similar pair of each image whose twin has another class, each image named once."""
    found, named = list[Finding](), set[int]()
    for pair in sorted(pairs, key=lambda pair: -pair.similarity):
        i, j = pair.first, pair.second
        if samples.label_numbers[i] != samples.label_numbers[j] and not {i, j} & named:
            named |= {i, j}
            found.append(Finding(samples.ids[i], TWIN_LABELS, LOOK, pair.similarity, samples.ids[j], i, j))
    return found


def leak(samples: Samples, cluster_N: np.ndarray, features_ND: Tensor, seed: int) -> Leak | None:
    """The accuracy on test with and without the images that have a near-duplicate in train. None where there are no such images."""
    split_N = np.array(samples.split_names)
    train_N, test_N = split_N == "train", split_N == "test"
    leaked_N = test_N & np.isin(cluster_N, cluster_N[train_N])
    if not leaked_N.any():
        return None
    head = solve("ridge", features_ND[train_N], samples.labels[train_N], len(samples.classes), seed=seed)
    clean_N = test_N & ~leaked_N

    def value(at_N: np.ndarray) -> float:
        return by_logits(head.logits(features_ND[at_N]).numpy(), samples.labels[at_N], resamples=0).value

    return Leak(int(test_N.sum()), int(leaked_N.sum()), value(test_N), value(clean_N) if clean_N.any() else float("nan"))
