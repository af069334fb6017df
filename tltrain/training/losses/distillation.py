"""The type of a distillation loss, and the default one: KL divergence between the softened outputs of teacher and student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from tltrain.models.precision import full_precision


@dataclass(frozen=True)
class DistillLoss:
    """A distillation loss, and what it reads beside the logits. A recipe names one in distill.loss."""

    value: Callable[..., Tensor]
    """(student's logits (B, K), teacher's logits (B, K), temperature, what `reads` says) -> (B,), one value a sample."""
    reads: Literal["logits", "probabilities", "labels", "batch", "features"] = "logits"
    """logits: nothing more. probabilities: nothing but the softmax of both at the temperature, so that distill.top_k may merge classes.

    labels: a fourth argument, the labels (B,); every image then has one, unmixed.

    batch: it compares images with each other. It is called with the micro-batches of all processes, which makes B one number on any number
    of processes. Its fourth argument is weights (B,): 0 for padding, which must count for nothing, else 1. The mean over weight is taken.

    features: it is called with features (B, D) of both, and no temperature (distill.target: features; with tokens B counts all places).
    """

    def __call__(self, student_BK: Tensor, teacher_BK: Tensor, temperature: float, *more: Tensor) -> Tensor:
        return self.value(student_BK, teacher_BK, temperature, *more)


def distillation(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of each sample (B,), both softened by T (Hinton et al. 2015).

    The divergence is summed over classes, so its mean over samples is the `batchmean` of PyTorch. A mean over all elements would be K
    times too small.
    """
    log_p_BK = F.log_softmax(full_precision(student_BK) / temperature, dim=1)
    log_q_BK = F.log_softmax(full_precision(teacher_BK) / temperature, dim=1)
    return F.kl_div(log_p_BK, log_q_BK, reduction="none", log_target=True).sum(1) * temperature**2


LOSS = DistillLoss(distillation, reads="probabilities")
