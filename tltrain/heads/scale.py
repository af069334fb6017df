"""Fits the map from scores to logits on held-out images: one factor, or a line for each of several labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_STEPS = 100
LEAST_SLOPE = 0.01
"""Of a label whose scores say nothing, by their standard deviation: its order is kept, and its probabilities are nearly even."""


def fit_scale(score_NK: Tensor, label_N: Tensor, weight_N: Tensor) -> float | None:
    """The factor above 0 that minimises the log loss of softmax(factor * score), rows weighted. None where no factor is better than 0.

    score_NK: of images that the head has not seen, in double. Targets are smoothed by one image of each class, as in Platt (1999):
    scores that are right everywhere would otherwise get an infinite factor, and the head would claim to be certain.
    The loss is convex in the factor, so that Newton's method finds it, kept inside an interval that shrinks.
    """
    n, num_classes = score_NK.shape
    smoothing = num_classes / (n + num_classes)
    score_NK = score_NK - score_NK.mean(1, keepdim=True)
    size = float(score_NK.abs().max())
    if size == 0 or not float(weight_N.sum()) > 0:
        return None
    score_NK, share_N = score_NK / size, weight_N / weight_N.sum()
    own_N = score_NK.gather(1, label_N[:, None]).squeeze(1)
    wanted = float(share_N @ ((1 - smoothing) * own_N))  # the mean of a row's scores is 0, so that the smoothed part adds nothing
    if wanted <= 0:
        return None
    low, high, factor = 0.0, float("inf"), 1.0
    for _ in range(MOST_STEPS):
        p_NK = (factor * score_NK).softmax(1)
        mean_N = (p_NK * score_NK).sum(1)
        slope = float(share_N @ mean_N) - wanted
        curve = float(share_N @ ((p_NK * score_NK.square()).sum(1) - mean_N.square()))
        low, high = (factor, high) if slope < 0 else (low, factor)
        step = factor - slope / curve if curve > 0 else float("inf")
        new = step if low < step < high else min(2 * low + 1, (low + high) / 2)
        if abs(new - factor) <= 1e-12 * factor:
            break
        factor = new
    return factor / size


def fit_lines(score_NK: Tensor, target_NK: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """(slope (K,) above 0, offset (K,)): sigmoid(slope * score + offset) has the least log loss for each of several labels (Platt 1999).

    score_NK: of images that the head has not seen, in double. target_NK: 0 or 1; smoothed as Platt does, to (n+ + 1) / (n+ + 2) and
    1 / (n- + 2). Where a label's scores say no more than a guess, its slope is nearly 0 and the offset its frequency.
    """
    lines = [_line(score_N, target_N, weight_N) for score_N, target_N in zip(score_NK.T, target_NK.T, strict=True)]
    return torch.tensor([slope for slope, _ in lines], dtype=torch.float64), torch.tensor([o for _, o in lines], dtype=torch.float64)


def _line(score_N: Tensor, has_N: Tensor, weight_N: Tensor) -> tuple[float, float]:
    """By Newton's method, each step halved until it lowers the loss, which is convex."""
    share_N, num = weight_N / weight_N.sum(), float(has_N.sum())
    target_N = has_N * (num + 1) / (num + 2) + (1 - has_N) / (len(has_N) - num + 2)
    mean = float(share_N @ score_N)
    spread = float((share_N @ (score_N - mean).square()).sqrt())
    frequency = share_N @ target_N
    point_2 = torch.stack([torch.zeros_like(frequency), frequency.logit()])
    if spread == 0:
        return 1.0, float(point_2[1]) - mean
    x_N2 = torch.stack([(score_N - mean) / spread, torch.ones_like(score_N)], 1)

    def loss(at_2: Tensor) -> float:
        return float(share_N @ F.binary_cross_entropy_with_logits(x_N2 @ at_2, target_N, reduction="none"))

    least = loss(point_2)
    for _ in range(MOST_STEPS):
        p_N = (x_N2 @ point_2).sigmoid()
        slope_2, curve_22 = x_N2.T @ (share_N * (p_N - target_N)), x_N2.T @ ((share_N * p_N * (1 - p_N))[:, None] * x_N2)
        step_2, size = torch.linalg.solve(curve_22 + 1e-12 * torch.eye(2, dtype=curve_22.dtype), slope_2), 1.0
        while size > 1e-6 and not loss(point_2 - size * step_2) < least:
            size /= 2
        if size <= 1e-6:
            break
        point_2 = point_2 - size * step_2
        least = loss(point_2)
    if point_2[0] <= 0:
        point_2 = torch.stack([torch.full_like(frequency, LEAST_SLOPE), frequency.logit()])
    slope = float(point_2[0]) / spread
    return slope, float(point_2[1]) - slope * mean
