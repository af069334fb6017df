"""Class means: the nearest one, as a linear head."""

from __future__ import annotations

import torch
from torch import Tensor


def coefficients(rows_ND: Tensor, target_NK: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """(weight (K, D), bias (K,)): a score is x mean - |mean|² / 2, which is -|x - mean|² / 2 but for a part that all classes share."""
    own_NK = weight_N[:, None] * target_NK
    mean_KD = (own_NK.T @ rows_ND) / own_NK.sum(0)[:, None]
    return mean_KD, -mean_KD.square().sum(1) / 2


def left_out(rows_ND: Tensor, target_NK: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """(scores (N, K) of each row by means without it, (N,) whether its class has other rows)."""
    mean_KD, bias_K = coefficients(rows_ND, target_NK, weight_N)
    label_N, total_K = target_NK.argmax(1), weight_N @ target_NK
    score_NK = rows_ND @ mean_KD.T + bias_K
    rest_N = total_K[label_N] - weight_N
    others_N = rest_N > 1e-12 * total_K[label_N]
    share_N = weight_N / torch.where(others_N, rest_N, 1.0)
    own_N = score_NK.gather(1, label_N[:, None]).squeeze(1)
    # The mean without x is mean + share * (mean - x); the score by it, worked out from |x|², |mean|² and x mean.
    square_N, length_K = rows_ND.square().sum(1), -2 * bias_K
    product_N = own_N - bias_K[label_N]
    inner_N = product_N + share_N * (product_N - square_N)
    apart_N = length_K[label_N] - 2 * product_N + square_N
    norm_N = length_K[label_N] + 2 * share_N * (length_K[label_N] - product_N) + share_N.square() * apart_N
    return score_NK.scatter(1, label_N[:, None], (inner_N - norm_N / 2)[:, None]), others_N
