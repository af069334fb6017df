"""Finds labels that are likely wrong and images unlike their class, by out-of-fold predictions from features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tltrain.analysis.doctor.findings import OUTLIER, WRONG, Finding
from tltrain.data.splits import folds
from tltrain.data.tables.corrections import LOOK, RELABEL
from tltrain.heads.neighbours import neighbours
from tltrain.heads.out_of_fold import out_of_fold

FOLDS = 5
LEAST_MARGIN, SURE_MARGIN = 0.6, 0.85
"""Margin from which a label is named, and from which the other class is suggested. `python -m benchmarks.doctor` measures both."""
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
    """(N, K): the mean of what a ridge head and the nearest neighbours say of each image, neither having seen its fold.

    group_N: images of one group, such as near-duplicates, lie in one fold, so that none vouches for another.
    """
    fold_N = folds(label_N, group_N, min(FOLDS, len(np.unique(group_N))), seed)
    ridge_NK = out_of_fold("ridge", features_ND, label_N, fold_N, num_classes, group_N=group_N, seed=seed).softmax(1)
    near_NK = neighbours(features_ND, label_N, num_classes, fold_N=fold_N).softmax(1)
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


def strangeness(features_ND: Tensor, label_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """(N,): mean cosine distance to the nearest images of the same class, in spreads of the set above its median.

    Images of the same group do not count as near: a copy makes nothing usual. 0 where a class has no other group.
    """
    unit_ND = F.normalize(features_ND.float(), dim=1)
    distance_N = np.full(len(label_N), np.nan)
    for label in np.unique(label_N):
        members = np.flatnonzero(label_N == label)
        rows_MD, groups = unit_ND[members], torch.from_numpy(group_N[members])
        for at in range(0, len(members), 2048):
            block = slice(at, at + 2048)
            cosine_BM = (rows_MD[block] @ rows_MD.T).masked_fill(groups[block, None] == groups, -2.0)
            best_Bk = cosine_BM.topk(min(NEAREST, len(members)), 1).values
            there = best_Bk > -2
            mean_B = (1 - best_Bk).masked_fill(~there, 0).sum(1) / there.sum(1)
            distance_N[members[block]] = mean_B.numpy()
    known = ~np.isnan(distance_N)
    if not known.any():
        return np.zeros(len(label_N))
    middle = float(np.median(distance_N[known]))
    spread = 1.4826 * float(np.median(np.abs(distance_N[known] - middle)))
    return np.where(known, (np.nan_to_num(distance_N) - middle) / max(spread, 1e-6), 0.0)


def outliers(strange_N: np.ndarray, ids: Sequence[str]) -> list[Finding]:
    """Images far from their class."""
    return [Finding(ids[i], OUTLIER, LOOK, float(strange_N[i]), position=i) for i in np.flatnonzero(strange_N >= FAR).tolist()]
