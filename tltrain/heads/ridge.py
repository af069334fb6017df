"""Ridge regression on one-hot targets, its strength by exact leave-one-out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tltrain.heads.standardised import Basis

STRENGTHS = tuple(10 ** (k / 3) for k in range(-15, 7))
"""Penalties that are tried, by image: 1e-5 to 100. The variance of a standardised column is 1."""
NUMBERS = 2**24
"""Numbers that a block of predictions of all strengths may hold."""


def coefficients(basis: Basis, target_NK: Tensor, weight_N: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """(weight (K, D), bias (K,)) of least squares on standardised features, penalised by strength * weight².

    strength: scikit-learn's alpha. target_NK: one-hot, in double.
    """
    mean_K, moment_RK = _moments(basis, target_NK, weight_N)
    return (basis.vectors_DR @ (moment_RK / (basis.value_R + strength / weight_N.sum())[:, None])).T, mean_K


def left_out(basis: Basis, target_NK: Tensor, weight_N: Tensor, strengths: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """What is said of each image by a fit to all others, for each strength: blocks of (rows, (S, B, K)).

    Exact, and from one decomposition: a linear fit's error on an image that it has not seen is its error on the image divided by
    1 - h, and h is the image's leverage (Allen 1974; Golub, Heath and Wahba 1979). Standardisation and the mean target stay in: the
    fit without the image has its own intercept.
    """
    total = weight_N.sum()
    mean_K, moment_RK = _moments(basis, target_NK, weight_N)
    shrink_SR = 1 / (basis.value_R + strengths[:, None] / total)
    size = max(1, NUMBERS // (len(strengths) * target_NK.shape[1]))
    for start in range(0, len(target_NK), size):
        at = slice(start, start + size)
        rows_BR, target_BK = basis.rows_NR[at], target_NK[at]
        leverage_SB = weight_N[at] / total * (1 + shrink_SR @ rows_BR.square().T)
        fitted_SBK = torch.stack([mean_K + rows_BR @ (shrink_R[:, None] * moment_RK) for shrink_R in shrink_SR])
        yield at, target_BK - (target_BK - fitted_SBK) / (1 - leverage_SB)[:, :, None]


@dataclass(frozen=True)
class WithoutFold:
    """Ridge regression on all rows but those of one fold, in the directions of its own covariance. For every strength from one
    decomposition: the fold's part is taken out of the covariance of all rows."""

    mean_R: Tensor
    turn_RR: Tensor
    value_R: Tensor
    moment_RK: Tensor
    mean_K: Tensor
    total: Tensor

    @classmethod
    def of(cls, basis: Basis, target_NK: Tensor, weight_N: Tensor, held_N: Tensor) -> WithoutFold:
        """held_N: positions of the rows of the fold. basis: of all rows with these weights."""
        rest_N = weight_N.clone()
        rest_N[held_N] = 0.0
        total = rest_N.sum()
        mean_R, mean_K = rest_N @ basis.rows_NR / total, rest_N @ target_NK / total
        held_BR = basis.rows_NR[held_N] * weight_N[held_N, None].sqrt()
        second_RR = (weight_N.sum() * basis.value_R.diag() - held_BR.T @ held_BR) / total
        value_R, turn_RR = torch.linalg.eigh(second_RR - mean_R[:, None] * mean_R)
        share_N1 = (rest_N / total)[:, None]
        moment_RK = turn_RR.T @ (basis.rows_NR.T @ (share_N1 * (target_NK - mean_K)))
        return cls(mean_R, turn_RR, value_R.clamp_min(0.0), moment_RK, mean_K, total)

    def scores(self, rows_BR: Tensor, strength: float) -> Tensor:
        """(B, K) for rows in the basis. strength: as in `coefficients`, for as many rows as this fit has seen."""
        shrink_R1 = 1 / (self.value_R + strength / self.total)[:, None]
        return self.mean_K + (rows_BR - self.mean_R) @ (self.turn_RR @ (shrink_R1 * self.moment_RK))


def _moments(basis: Basis, target_NK: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mean target (K,), and the covariance of rows and targets (R, K)."""
    share_N1 = (weight_N / weight_N.sum())[:, None]
    mean_K = (share_N1 * target_NK).sum(0)
    return mean_K, basis.rows_NR.T @ (share_N1 * (target_NK - mean_K))
