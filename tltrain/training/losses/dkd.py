"""Decoupled distillation: how sure the teacher is of the label, and what it says of the other classes, as two terms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tltrain.models.precision import full_precision
from tltrain.training.losses.distillation import DistillLoss

ALPHA, BETA = 1.0, 8.0
"""Weights of the two terms: the authors' for CIFAR-100."""


def decoupled(student_BK: Tensor, teacher_BK: Tensor, temperature: float, labels_B: Tensor) -> Tensor:
    """T^2 (ALPHA KL of the label against the rest + BETA KL among the rest) of each sample (B,), softened by T.

    Zhao et al. 2022, arXiv 2203.08679. `distillation` is the same with ALPHA = 1 and, in place of BETA, the teacher's probability of the
    rest. That is small where the teacher is sure.
    """
    pairs = zip(_parts(student_BK, labels_B, temperature), _parts(teacher_BK, labels_B, temperature), strict=True)
    label_B, rest_B = (F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1) for log_p, log_q in pairs)
    return (ALPHA * label_B + BETA * rest_B) * temperature**2


def _parts(logits_BK: Tensor, labels_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log probabilities (B, 2) of the label and of the rest, and (B, K - 1) of each other class given that it is not the label."""
    log_p_BK = F.log_softmax(full_precision(logits_BK) / temperature, dim=1)
    number = torch.arange(log_p_BK.shape[1] - 1, device=log_p_BK.device)
    others = log_p_BK.gather(1, number + (number >= labels_B[:, None]))  # a mask would make the host wait for the device
    rest_B1 = others.logsumexp(1, keepdim=True)
    return torch.cat([log_p_BK.gather(1, labels_B[:, None]), rest_B1], 1), others - rest_B1


LOSS = DistillLoss(decoupled, reads="labels")
