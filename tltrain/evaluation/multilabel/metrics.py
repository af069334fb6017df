"""Metrics of several labels, by scikit-learn. Classes that no image has are left out of means over classes, as they have no value."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from tltrain.core.metric import Metric
from tltrain.evaluation.multilabel.predictions import LabelPredictions


def average_precision(p: LabelPredictions) -> np.ndarray:
    """(K,) of each class. NaN where no image has it."""
    return np.array([
        average_precision_score(target_N, logit_N) if target_N.any() else np.nan
        for target_N, logit_N in zip(p.target.T, p.logit.T, strict=True)
    ])  # fmt: skip


def auroc(p: LabelPredictions) -> np.ndarray:
    """(K,) area under the ROC curve of each class. NaN where no image, or each, has it."""
    return np.array([
        roc_auc_score(target_N, logit_N) if target_N.any() and not target_N.all() else np.nan
        for target_N, logit_N in zip(p.target.T, p.logit.T, strict=True)
    ])  # fmt: skip


def mean(value_K: np.ndarray) -> float | None:
    """The mean over the classes that have a value. None if none has."""
    there = value_K[~np.isnan(value_K)]
    return float(there.mean()) if len(there) else None


def _finite(p: LabelPredictions) -> bool:
    """scikit-learn refuses logits that are not finite; their loss says what is wrong."""
    return bool(np.isfinite(p.logit).all())


MAP = Metric(lambda p, _: mean(average_precision(p)) if _finite(p) else None, title="mAP", is_share=True, of=("labels",))
F1_MICRO = Metric(
    lambda p, _: float(f1_score(p.target, p.named, average="micro", zero_division=0)), title="F1, micro mean", is_share=True, of=("labels",)
)
AUROC = Metric(lambda p, _: mean(auroc(p)) if _finite(p) else None, title="AUROC, macro mean", is_share=True, of=("labels",))
SUBSET = Metric(lambda p, _: float((p.named == p.target).all(1).mean()), title="exact sets", is_share=True, of=("labels",))
