"""Losses, one value a sample: the engine sums them, so that uneven micro-batches and ranks weigh each sample alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tltrain.core import registry
from tltrain.core.errors import UserError

LabelLoss = Callable[[Tensor, Tensor, float, Tensor | None], Tensor]
"""(logits (B, K), labels (B,), label smoothing, class weights (K,) or None) -> (B,). A recipe names one in stages.N.loss."""

DistillLoss = Callable[[Tensor, Tensor, float], Tensor]
"""(logits of the student (B, K), of the teacher (B, K), temperature) -> (B,). A recipe names one in distill.loss."""


def label_loss(name: str, num_classes: int) -> LabelLoss:
    """The loss that stages.N.loss names, tried once on two samples. Raises UserError where it is not one value a sample."""
    found = cast(LabelLoss, registry.find("losses", name, f"a stage's loss is {name!r}"))
    _check_per_sample(name, found(torch.zeros(2, num_classes), torch.tensor([0, num_classes - 1]), 0.0, None))
    return found


def distill_loss(name: str, num_classes: int) -> DistillLoss:
    """The loss that distill.loss names, tried once on two samples. Raises UserError where it is not one value a sample."""
    found = cast(DistillLoss, registry.find("distill_losses", name, f"distill.loss is {name!r}"))
    _check_per_sample(name, found(torch.zeros(2, num_classes), torch.zeros(2, num_classes), 1.0))
    return found


def _check_per_sample(name: str, loss: Tensor) -> None:
    if loss.shape != (2,):
        raise UserError(f"the loss {name} gives shape {tuple(loss.shape)} for two samples; it must give one value a sample, unreduced")


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
