"""Distillation loss: KL divergence between the softened outputs of teacher and student."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from tltrain.models.precision import full_precision


def distillation(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of each sample (B,), both softened by T (Hinton et al. 2015).

    The divergence is summed over classes, so its mean over samples is the `batchmean` of PyTorch. A mean over all elements would be K
    times too small.
    """
    log_p_BK = F.log_softmax(full_precision(student_BK) / temperature, dim=1)
    log_q_BK = F.log_softmax(full_precision(teacher_BK) / temperature, dim=1)
    return F.kl_div(log_p_BK, log_q_BK, reduction="none", log_target=True).sum(1) * temperature**2
