"""One factor that turns scores into logits, fitted on what a head says of images that it has not seen."""

from __future__ import annotations

from torch import Tensor

MOST_STEPS = 100


def fit_scale(score_NK: Tensor, label_N: Tensor, weight_N: Tensor) -> float | None:
    """The factor above 0 that minimises the log loss of softmax(factor * score), rows weighted. None where no factor is better than 0.

    score_NK: of images that the head has not seen, in double. Targets are smoothed by one image of each class, as in Platt (1999):
    scores that are right everywhere would otherwise get an infinite factor, and the head would claim to be certain.
    The loss is convex in the factor, so that Newton's method finds it, kept inside an interval that shrinks.
    """
    n, num_classes = score_NK.shape
    smoothing = num_classes / (n + num_classes)
    score_NK = score_NK - score_NK.mean(1, keepdim=True)
    size = float(score_NK.abs().max())
    if size == 0 or not float(weight_N.sum()) > 0:
        return None
    score_NK, share_N = score_NK / size, weight_N / weight_N.sum()
    own_N = score_NK.gather(1, label_N[:, None]).squeeze(1)
    wanted = float(share_N @ ((1 - smoothing) * own_N))  # the mean of a row's scores is 0, so that the smoothed part adds nothing
    if wanted <= 0:
        return None
    low, high, factor = 0.0, float("inf"), 1.0
    for _ in range(MOST_STEPS):
        p_NK = (factor * score_NK).softmax(1)
        mean_N = (p_NK * score_NK).sum(1)
        slope = float(share_N @ mean_N) - wanted
        curve = float(share_N @ ((p_NK * score_NK.square()).sum(1) - mean_N.square()))
        low, high = (factor, high) if slope < 0 else (low, factor)
        step = factor - slope / curve if curve > 0 else float("inf")
        new = step if low < step < high else min(2 * low + 1, (low + high) / 2)
        if abs(new - factor) <= 1e-12 * factor:
            break
        factor = new
    return factor / size
