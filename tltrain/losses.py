"""Objectives, one value a sample: the engine sums them, so that uneven micro-batches and ranks weigh each sample alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits_BK: Tensor, labels_B: Tensor, smoothing: float = 0.0, class_weights_K: Tensor | None = None) -> Tensor:
    """Cross entropy of each sample (B,). Label smoothing spreads `smoothing` evenly over all classes (Szegedy et al. 2016);
    class weights multiply a sample's whole term by its label's weight."""
    loss_B = F.cross_entropy(full_precision(logits_BK), labels_B, reduction="none", label_smoothing=smoothing)
    return loss_B if class_weights_K is None else loss_B * class_weights_K[labels_B]


def distillation(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of each sample (B,), both softened by T (Hinton et al. 2015).

    Summed over classes and not averaged over them: the mean over samples is `batchmean`. Dividing by the number of
    elements would make the term K times too small.
    """
    log_p_BK = F.log_softmax(full_precision(student_BK) / temperature, dim=1)
    log_q_BK = F.log_softmax(full_precision(teacher_BK) / temperature, dim=1)
    return F.kl_div(log_p_BK, log_q_BK, reduction="none", log_target=True).sum(1) * temperature**2


def full_precision(x: Tensor) -> Tensor:
    """bf16 and fp16 in fp32: a softmax over half-precision logits loses the small probabilities that distillation is about."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
