"""Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011): parts images with several labels so that each class is in each part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cut_label_sets(label_NK: np.ndarray, groups: Sequence[Sequence[int]], fraction: float) -> np.ndarray:
    """Mask (N,) of the samples to cut from train: about `fraction` of each class and of all, whole groups only, never all of a class.

    label_NK: 1 where a sample has a class. groups: the samples of each group; every sample is in one. Their order decides between equals.
    The rarest class goes first: each of its groups goes to the part that lacks it most, then to the part that lacks samples most. A class
    with two or more samples gives at least one, if its groups allow it. Groups without any class are shared out last.
    """
    size_G = np.array([len(members) for members in groups])
    group_GK = np.zeros((len(groups), label_NK.shape[1]), dtype=np.int64)
    np.add.at(group_GK, np.repeat(np.arange(len(groups)), size_G), label_NK[np.concatenate([np.array(members) for members in groups])])
    count_K = group_GK.sum(0)
    least_K = np.where(count_K > 1, np.clip(fraction * count_K, 1, np.maximum(count_K - 1, 1)), 0.0)
    want_PK = np.stack([least_K, count_K - least_K])  # what the cut part and train still lack
    want_P = np.array([fraction, 1 - fraction]) * size_G.sum()
    room_K = np.maximum(count_K - 1, 0)  # how many of each class may leave train
    stays = int(size_G.sum())  # samples of train, which is never empty
    leaves_G, placed_G = np.zeros(len(groups), dtype=bool), np.zeros(len(groups), dtype=bool)

    def place(g: int, lack: tuple[float, float]) -> None:
        nonlocal stays
        fits = bool((group_GK[g] <= room_K).all()) and size_G[g] < stays
        cut = fits and (lack[0] > lack[1] or (lack[0] == lack[1] and want_P[0] > want_P[1]))
        part = 0 if cut else 1
        want_PK[part] -= group_GK[g]
        want_P[part] -= size_G[g]
        placed_G[g], leaves_G[g] = True, cut
        if cut:
            room_K[:] -= group_GK[g]
            stays -= int(size_G[g])

    left_K = count_K.copy()
    while (left_K > 0).any():
        rarest = int(np.argmin(np.where(left_K > 0, left_K, np.iinfo(np.int64).max)))
        for g in np.flatnonzero(~placed_G & (group_GK[:, rarest] > 0)).tolist():
            place(g, (want_PK[0, rarest], want_PK[1, rarest]))
            left_K -= group_GK[g]
    for g in np.flatnonzero(~placed_G).tolist():
        place(g, (want_P[0], want_P[1]))
    mask_N = np.zeros(len(label_NK), dtype=bool)
    for g in np.flatnonzero(leaves_G).tolist():
        mask_N[list(groups[g])] = True
    return mask_N
