"""Features standardised, and turned into the basis in which ridge and logistic regression are cheap and well conditioned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 4096
"""Rows that are standardised at a time: features of half precision stay as they are, and one block alone is in double."""
CONSTANT = 1e-7
"""A column whose standard deviation is below this part of its largest value says nothing: it is rounding of fp32."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for linear algebra: the order of sums, and so the bits, depend on the number of threads. Restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Scaling:
    """Standardisation of each column: (x - mean) * inverse. inverse is 0 for a constant column, which is thereby ignored."""

    mean_D: Tensor
    inverse_D: Tensor

    @classmethod
    def of(cls, features_ND: Tensor, weight_N: Tensor) -> Scaling:
        """Weighted mean and standard deviation of each column, so that a weight of 2 is the same as the row twice. Two passes."""
        total, largest_D = weight_N.sum(), torch.zeros(features_ND.shape[1], dtype=torch.float64)
        sum_D, square_D = torch.zeros_like(largest_D), torch.zeros_like(largest_D)
        for at, block in _blocks(features_ND):
            sum_D += weight_N[at] @ block
            largest_D = torch.maximum(largest_D, block.abs().amax(0))
        mean_D = sum_D / total
        for at, block in _blocks(features_ND):
            square_D += weight_N[at] @ (block - mean_D).square()
        std_D = (square_D / total).sqrt()
        varies_D = std_D > CONSTANT * largest_D
        return cls(mean_D, torch.where(varies_D, 1 / std_D, 0.0))

    def __call__(self, features_ND: Tensor) -> Tensor:
        """(N, D) standardised, in double."""
        return (features_ND.double() - self.mean_D) * self.inverse_D

    def folded(self, weight_KD: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and bias that say of plain features what the given ones say of standardised features."""
        plain_KD = weight_KD * self.inverse_D
        return plain_KD, bias_K - plain_KD @ self.mean_D


@dataclass(frozen=True)
class Basis:
    """Standardised features in the basis of the eigenvectors of their weighted covariance.

    The basis is orthonormal, so that a penalty on the size of the weights is the same in it. Directions without variance are left out:
    no more than min(N, D) remain, and of N < D images far fewer numbers are worked with.
    """

    vectors_DR: Tensor
    value_R: Tensor
    """The variance along each vector, the largest last; its sum is the number of columns that vary."""
    rows_NR: Tensor

    @classmethod
    def of(cls, features_ND: Tensor, scaling: Scaling, weight_N: Tensor) -> Basis:
        """From the covariance (D, D), or from the products of rows (N, N) where there are fewer rows than columns."""
        num_rows, num_columns = features_ND.shape
        root_N = (weight_N / weight_N.sum()).sqrt()
        if num_rows < num_columns:
            rows_ND = scaling(features_ND)
            own_ND = rows_ND * root_N[:, None]
            value_R, side_NR = _eigen(own_ND @ own_ND.T, num_columns)
            vectors_DR = own_ND.T @ side_NR / value_R.sqrt()
            return cls(vectors_DR, value_R, rows_ND @ vectors_DR)
        covariance_DD = torch.zeros(num_columns, num_columns, dtype=torch.float64)
        for at, block in _blocks(features_ND):
            own = scaling(block) * root_N[at, None]
            covariance_DD += own.T @ own
        value_R, vectors_DR = _eigen(covariance_DD, num_rows)
        rows_NR = torch.empty(num_rows, len(value_R), dtype=torch.float64)
        for at, block in _blocks(features_ND):
            rows_NR[at] = scaling(block) @ vectors_DR
        return cls(vectors_DR, value_R, rows_NR)


def _eigen(matrix: Tensor, other_side: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues above rounding, ascending, and their vectors. other_side: the longer side of the rows that were multiplied."""
    value, vectors = torch.linalg.eigh(matrix)
    kept = value > value[-1:].clamp_min(torch.finfo(torch.float64).tiny) * max(len(matrix), other_side) * torch.finfo(torch.float64).eps
    return value[kept], vectors[:, kept].contiguous()


def _blocks(features_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(features_ND), BLOCK):
        at = slice(start, start + BLOCK)
        yield at, features_ND[at].double()
