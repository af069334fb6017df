"""Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011): parts images with several labels so that each class is in each part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def cut_label_sets(label_NK: np.ndarray, groups: Sequence[Sequence[int]], fraction: float) -> np.ndarray:
    """Mask (N,) of the samples to cut from train: about `fraction` of each class and of all, whole groups only, never all of a class.

    label_NK: 1 where a sample has a class. groups: the samples of each group; every sample is in one. Their order decides between equals.
    The rarest class goes first: each of its groups goes to the part that lacks it most, then to the part that lacks samples most. A class
    with two or more samples gives at least one, if its groups allow it. Groups without any class are shared out last.
    """
    size_G, group_GK = _counted(label_NK, groups)
    count_K = group_GK.sum(0)
    least_K = np.where(count_K > 1, np.clip(fraction * count_K, 1, np.maximum(count_K - 1, 1)), 0.0)
    want_PK = np.stack([least_K, count_K - least_K])  # what the cut part and train still lack
    want_P = np.array([fraction, 1 - fraction]) * size_G.sum()
    room_K = np.maximum(count_K - 1, 0)  # how many of each class may leave train
    stays = int(size_G.sum())  # samples of train, which is never empty
    leaves_G = np.zeros(len(groups), dtype=bool)

    def place(g: int, lack: tuple[float, float]) -> None:
        nonlocal stays
        fits = bool((group_GK[g] <= room_K).all()) and size_G[g] < stays
        cut = fits and (lack[0] > lack[1] or (lack[0] == lack[1] and want_P[0] > want_P[1]))
        part = 0 if cut else 1
        want_PK[part] -= group_GK[g]
        want_P[part] -= size_G[g]
        leaves_G[g] = cut
        if cut:
            room_K[:] -= group_GK[g]
            stays -= int(size_G[g])

    for g, rarest in _rarest_first(group_GK):
        place(g, (want_P[0], want_P[1]) if rarest is None else (want_PK[0, rarest], want_PK[1, rarest]))
    mask_N = np.zeros(len(label_NK), dtype=bool)
    for g in np.flatnonzero(leaves_G).tolist():
        mask_N[list(groups[g])] = True
    return mask_N


def fold_label_sets(label_NK: np.ndarray, groups: Sequence[Sequence[int]], k: int) -> np.ndarray:
    """The fold (N,) int64 of each sample, 0 to k - 1: about as many of each class, and of all, in each; whole groups only, none empty.

    Arguments as in `cut_label_sets`; there are at least k groups. The groups of the rarest class go first, large ones before small ones,
    each to the fold that lacks it most, then to the fold that lacks samples most. Where a class of several groups lies in one fold alone
    at the end, groups are moved while that leaves fewer such classes.
    """
    groups = sorted(groups, key=len, reverse=True)  # stable: of equal size they stay in their order
    size_G, group_GK = _counted(label_NK, groups)
    want_FK, want_F = np.tile(group_GK.sum(0) / k, (k, 1)), np.full(k, size_G.sum() / k)
    fold_G, empty, left = np.empty(len(groups), dtype=np.int64), set(range(k)), len(groups)
    for g, rarest in _rarest_first(group_GK):
        lack_F = want_F if rarest is None else want_FK[:, rarest]
        fold = min(empty if len(empty) == left else range(k), key=lambda f: (-lack_F[f], -want_F[f], f))
        want_FK[fold] -= group_GK[g]
        want_F[fold] -= size_G[g]
        fold_G[g] = fold
        empty.discard(fold)
        left -= 1
    while (better_G := _spread(fold_G, size_G, group_GK, k)) is not None:
        fold_G = better_G
    fold_N = np.empty(len(label_NK), dtype=np.int64)
    for members, fold in zip(groups, fold_G.tolist(), strict=True):
        fold_N[list(members)] = fold
    return fold_N


def _spread(fold_G: np.ndarray, size_G: np.ndarray, group_GK: np.ndarray, k: int) -> np.ndarray | None:
    """The folds of groups with the smallest group moved by which fewer classes lie in one fold alone. None: no move does that."""

    def alone(fold_G: np.ndarray) -> np.ndarray:
        return np.sum([(group_GK[fold_G == f].sum(0) > 0) for f in range(k)], axis=0) == 1

    alone_K, num_F = alone(fold_G), np.bincount(fold_G, minlength=k)
    if not (alone_K & ((group_GK > 0).sum(0) > 1)).any():
        return None
    holds_G = (group_GK[:, alone_K] > 0).any(1) & (num_F[fold_G] > 1)
    full_F = np.bincount(fold_G, size_G, minlength=k)
    for g in sorted(np.flatnonzero(holds_G).tolist(), key=lambda g: (size_G[g], g)):
        for f in np.argsort(full_F, kind="stable").tolist():
            moved_G = fold_G.copy()
            moved_G[g] = f
            if alone(moved_G).sum() < alone_K.sum():
                return moved_G
    return None


def keep_of_each_label(label_NK: np.ndarray, num: int, order: Sequence[int]) -> np.ndarray:
    """Sorted positions of the samples, in this order, of which a class has fewer than `num` so far; of those without any class `num`."""
    kept, count_K, alone = list[int](), np.zeros(label_NK.shape[1], dtype=np.int64), 0
    for i in order:
        has_K = label_NK[i] > 0
        if (count_K[has_K] < num).any() or (not has_K.any() and alone < num):
            kept.append(i)
            count_K += has_K
            alone += not has_K.any()
    return np.array(sorted(kept), dtype=np.int64)


def _counted(label_NK: np.ndarray, groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(samples of each group (G,), those of each class (G, K))."""
    size_G = np.array([len(members) for members in groups])
    group_GK = np.zeros((len(groups), label_NK.shape[1]), dtype=np.int64)
    np.add.at(group_GK, np.repeat(np.arange(len(groups)), size_G), label_NK[np.concatenate([np.array(members) for members in groups])])
    return size_G, group_GK


def _rarest_first(group_GK: np.ndarray) -> Iterator[tuple[int, int | None]]:
    """Each group once, with the class that it is placed by: the one of which fewest samples are left. Last those without any: None."""
    left_K, placed_G = group_GK.sum(0), np.zeros(len(group_GK), dtype=bool)
    while (left_K > 0).any():
        rarest = int(np.argmin(np.where(left_K > 0, left_K, np.iinfo(np.int64).max)))
        for g in np.flatnonzero(~placed_G & (group_GK[:, rarest] > 0)).tolist():
            placed_G[g] = True
            left_K -= group_GK[g]
            yield g, rarest
    for g in np.flatnonzero(~placed_G).tolist():
        yield g, None
