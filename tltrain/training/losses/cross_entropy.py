"""Cross entropy with label smoothing and class weights."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from tltrain.models.precision import full_precision
from tltrain.training.losses.binary import binary_cross_entropy


def cross_entropy(logits_BK: Tensor, labels_B: Tensor, smoothing: float = 0.0, class_weights_K: Tensor | None = None) -> Tensor:
    """Cross entropy (B,) of logits (B, K).

    Label smoothing spreads `smoothing` evenly over all classes (Szegedy et al. 2016). The loss of a sample is multiplied by the class
    weight of its label. Several labels (B, K), 1 where an image has a class: `binary_cross_entropy`, with class weights (2, K).
    """
    if labels_B.ndim == 2:
        return binary_cross_entropy(logits_BK, labels_B, smoothing, class_weights_K)
    loss_B = F.cross_entropy(full_precision(logits_BK), labels_B, reduction="none", label_smoothing=smoothing)
    return loss_B if class_weights_K is None else loss_B * class_weights_K[labels_B]
