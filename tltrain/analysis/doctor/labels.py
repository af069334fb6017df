"""Finds labels that are likely wrong and images unlike their class, by out-of-fold predictions from features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tltrain.analysis.doctor.findings import OUTLIER, WRONG, Finding
from tltrain.data.multilabel.label_sets import written
from tltrain.data.splits import folds
from tltrain.data.tables.corrections import LOOK, RELABEL
from tltrain.heads.neighbours import neighbours
from tltrain.heads.out_of_fold import out_of_fold

FOLDS = 5
LEAST_MARGIN, SURE_MARGIN = 0.6, 0.85
"""Margin from which a label is named, and from which the other class is suggested. `python -m benchmarks.doctor` measures both."""
FOUND = 0.5
"""Mean probability of a label on the images that have it, from which one that seems to lack it is doubted."""
NEAREST = 10
FAR = 2.5
"""Spreads above the median from which an image is an outlier."""


def flattened(features_ND: Tensor) -> Tensor:
    """Features (N, D) with less weight on a few large values: their fourth root, if the network gives hardly any below 0.

    A step of Tukey's ladder, as Yang et al. 2021 (arXiv 2101.06395) take for few images, who take the square root. Measured with
    EfficientNet-Lite0 on planted errors: of 10 outliers 4.7 are among the 20 farthest as features are, 6.3 with the square root, 7.7 with
    the fourth. Others, such as those behind a layer norm, are returned as they are.
    """
    low, high = features_ND.min(), features_ND.max()
    return features_ND.clamp_min(0).sqrt().sqrt() if low > -0.05 * high else features_ND


def unseen_probabilities(features_ND: Tensor, label_N: np.ndarray, group_N: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """(N, K): the mean of what a ridge head and the nearest neighbours say of each image, neither having seen its fold: the probability of
    each class, or of each of several labels (label_N: (N, K)) that an image has it.

    group_N: images of one group, such as near-duplicates, lie in one fold, so that none vouches for another.
    """
    fold_N = folds(label_N, group_N, min(FOLDS, len(np.unique(group_N))), seed)
    ridge_NK = out_of_fold("ridge", features_ND, label_N, fold_N, num_classes, group_N=group_N, seed=seed)
    near_NK = neighbours(features_ND, label_N, num_classes, fold_N=fold_N)
    ridge_NK, near_NK = (logits.sigmoid() if label_N.ndim == 2 else logits.softmax(1) for logits in (ridge_NK, near_NK))
    return ((ridge_NK + near_NK) / 2).numpy()


def wrong_labels(p_NK: np.ndarray, label_N: np.ndarray, ids: Sequence[str], classes: Sequence[str]) -> list[Finding]:
    """Images to which another class is far more likely than their own, without having seen them (as in confident learning, Northcutt et
    al. 2021, arXiv 1911.00068)."""
    row = np.arange(len(label_N))
    other_NK = p_NK.copy()
    other_NK[row, label_N] = -1
    other_N = other_NK.argmax(1)
    margin_N = other_NK[row, other_N] - p_NK[row, label_N]
    found = []
    for i in np.flatnonzero(margin_N >= LEAST_MARGIN).tolist():
        other = classes[other_N[i]]
        suggestion = f"{RELABEL}:{other}" if margin_N[i] >= SURE_MARGIN else LOOK
        found.append(Finding(ids[i], WRONG, suggestion, float(margin_N[i]), other, i))
    return found


def wrong_sets(p_NK: np.ndarray, label_NK: np.ndarray, ids: Sequence[str], classes: Sequence[str]) -> list[Finding]:
    """Images of several labels to which a label that they lack is far more likely than not, or one that they have far less.

    It must also be as likely as to the images that have it in the mean, or as unlikely as to those that lack it (confident learning, label
    by label), and a label that is unlikely even to the images that have it tells nothing. The set that the image rather looks like is
    named, and nothing is suggested but a look.
    """
    has_NK = label_NK > 0
    with np.errstate(invalid="ignore"):  # of a label that all have, or none, nothing is known
        with_K = np.where(has_NK, p_NK, 0).sum(0) / has_NK.sum(0)
        without_K = np.where(has_NK, 0, p_NK).sum(0) / (~has_NK).sum(0)
    margin_NK = np.where(has_NK, 1 - 2 * p_NK, 2 * p_NK - 1)
    doubted_NK = (margin_NK >= LEAST_MARGIN) & np.where(has_NK, (p_NK <= without_K) & (with_K >= FOUND), p_NK >= with_K)
    at = np.flatnonzero(doubted_NK.any(1))
    looks_like = written(has_NK[at] ^ doubted_NK[at], classes)
    margins = np.where(doubted_NK, margin_NK, 0).max(1)[at].tolist()
    found = zip(at.tolist(), looks_like, margins, strict=True)
    return [Finding(ids[i], WRONG, LOOK, margin, name or "none of the labels", i) for i, name, margin in found]


def strangeness(features_ND: Tensor, label_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """(N,): mean cosine distance to the nearest images of the same class, in spreads of the set above its median.

    Images of the same group do not count as near: a copy makes nothing usual. 0 where a class has no other group. Of several labels
    (label_N: (N, K)) that label counts, or having none, whose images are nearest.
    """
    unit_ND = F.normalize(features_ND.float(), dim=1)
    distance_N = np.full(len(label_N), np.nan)
    for members in _alike(label_N):
        rows_MD, groups = unit_ND[members], torch.from_numpy(group_N[members])
        for at in range(0, len(members), 2048):
            block = slice(at, at + 2048)
            cosine_BM = (rows_MD[block] @ rows_MD.T).masked_fill(groups[block, None] == groups, -2.0)
            best_Bk = cosine_BM.topk(min(NEAREST, len(members)), 1).values
            there = best_Bk > -2
            mean_B = (1 - best_Bk).masked_fill(~there, 0).sum(1) / there.sum(1)
            distance_N[members[block]] = np.fmin(distance_N[members[block]], mean_B.numpy())
    known = ~np.isnan(distance_N)
    if not known.any():
        return np.zeros(len(label_N))
    middle = float(np.median(distance_N[known]))
    spread = 1.4826 * float(np.median(np.abs(distance_N[known] - middle)))
    return np.where(known, (np.nan_to_num(distance_N) - middle) / max(spread, 1e-6), 0.0)


def _alike(label_N: np.ndarray) -> list[np.ndarray]:
    """The positions of the images of each class, or with each label, and of those without any."""
    if label_N.ndim == 1:
        return [np.flatnonzero(label_N == label) for label in np.unique(label_N)]
    parts = [np.flatnonzero(has_N) for has_N in (*label_N.T, ~label_N.any(1))]
    return [members for members in parts if len(members)]


def outliers(strange_N: np.ndarray, ids: Sequence[str]) -> list[Finding]:
    """Images far from their class."""
    return [Finding(ids[i], OUTLIER, LOOK, float(strange_N[i]), position=i) for i in np.flatnonzero(strange_N >= FAR).tolist()]
