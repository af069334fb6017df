"""The losses of several labels: binary cross entropy with label smoothing and weights of classes, and distillation of each label."""

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


def binary_distillation(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of each sample (B,): the mean over classes of that between two answers, the sigmoids at temperature T."""
    student, teacher = full_precision(student_BK) / temperature, full_precision(teacher_BK) / temperature
    log_p, log_q = ((F.logsigmoid(logits), F.logsigmoid(-logits)) for logits in (student, teacher))
    divergence_BK = sum(F.kl_div(p, q, reduction="none", log_target=True) for p, q in zip(log_p, log_q, strict=True))
    return torch.as_tensor(divergence_BK).mean(1) * temperature**2
