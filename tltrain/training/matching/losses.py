"""Distance of the student's mapped features from the teacher's."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from tltrain.models.precision import full_precision
from tltrain.training.losses.distillation import DistillLoss

SHORT = 1e-3
"""A shorter feature counts as one of this length: the gradient at zeros would be 1e8 by torch's default."""


def cosine(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """1 - cosine of the angle between both features of each sample (B,): 0 to 2. Their lengths do not count, if at least 0.001."""
    return 1 - F.cosine_similarity(full_precision(student_BD), full_precision(teacher_BD), dim=1, eps=SHORT)


def smooth_l1(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Half the square of the difference, from 1 on its size less a half (Girshick 2015, arXiv 1504.08083), mean over numbers (B,)."""
    return F.smooth_l1_loss(full_precision(student_BD), full_precision(teacher_BD), reduction="none").mean(1)


COSINE = DistillLoss(cosine, reads="features")
SMOOTH_L1 = DistillLoss(smooth_l1, reads="features")
