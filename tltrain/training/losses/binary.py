"""Binary cross entropy of several labels, with label smoothing and weights of classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tltrain.models.precision import full_precision


def binary_cross_entropy(logits_BK: Tensor, labels_BK: Tensor, smoothing: float = 0.0, weights_2K: Tensor | None = None) -> Tensor:
    """Binary cross entropy (B,) of logits (B, K) with labels (B, K), 1 where an image has a class: the mean over classes.

    Label smoothing spreads `smoothing` evenly over the two answers: 1 becomes 1 - smoothing / 2. weights_2K: of the images without each
    class, and of those with it; they follow the labels, not the smoothed ones.
    """
    has_BK = labels_BK.float()
    target_BK = has_BK * (1 - smoothing) + smoothing / 2
    loss_BK = F.binary_cross_entropy_with_logits(full_precision(logits_BK), target_BK, reduction="none")
    if weights_2K is not None:
        loss_BK = loss_BK * torch.where(has_BK > 0, weights_2K[1], weights_2K[0])
    return loss_BK.mean(1)
