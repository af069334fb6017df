"""DIST: the student keeps the teacher's relations, between the classes of an image and between the images of a class."""

from __future__ import annotations

from torch import Tensor

from tltrain.models.precision import full_precision
from tltrain.training.losses.distillation import DistillLoss

LEAST_SPREAD = 0.1
"""Standard deviation over mean, below which the student's probabilities count as that spread. See `_correlation`."""


def relations(student_BK: Tensor, teacher_BK: Tensor, temperature: float, weight_B: Tensor) -> Tensor:
    """T^2 (1 - correlation over classes) of each sample (B,), plus T^2 (1 - mean correlation over the samples of each class).

    Huang et al. 2022, arXiv 2205.10536, with beta = gamma = 1. Correlations are Pearson's, of probabilities softened by T. The second
    term is one value for the batch, which every sample has. Samples of weight 0 are not of the batch.
    """
    p_BK, q_BK = ((full_precision(logits) / temperature).softmax(1) for logits in (student_BK, teacher_BK))
    between_classes_B = 1 - _correlation(p_BK, q_BK, p_BK.new_ones(p_BK.shape[1]))
    within_classes = 1 - _correlation(p_BK.T, q_BK.T, weight_B.to(p_BK.dtype)).mean()
    return (between_classes_B + within_classes) * temperature**2


def _correlation(p_RN: Tensor, q_RN: Tensor, weight_N: Tensor, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation (R,) of each row of p with that of q. eps: the authors'.

    A head of zeros says the same of all classes, and a correlation has no value there: the authors' formula has a gradient of about
    1 / eps, which the optimizer's moments remember for thousands of steps. So the spread of p counts as LEAST_SPREAD of its mean at least.
    A student that has begun to learn lies above that, and has the authors' value.
    """
    count = weight_N.sum()
    mean_p_R1, mean_q_R1 = ((x * weight_N).sum(1, keepdim=True) / count for x in (p_RN, q_RN))
    p_RN, q_RN = (p_RN - mean_p_R1) * weight_N, (q_RN - mean_q_R1) * weight_N
    least_R = (LEAST_SPREAD * mean_p_R1 * count.sqrt()).squeeze(1).detach()
    return (p_RN * q_RN).sum(1) / (p_RN.norm(dim=1).clamp_min(least_R) * q_RN.norm(dim=1) + eps)


LOSS = DistillLoss(relations, reads="batch")
