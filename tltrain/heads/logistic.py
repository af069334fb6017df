"""Multinomial logistic regression in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from tltrain.heads.standardised import Basis

STRENGTHS = tuple(10 ** (-k / 2) for k in range(13))
"""Penalties that are tried, by image, from strong to weak: 1 to 1e-6. The variance of a standardised column is 1."""
FINE, COARSE = 1e-8, 1e-4
"""Largest slope that is left, of the mean log loss: of the head that is handed on, and of those that are only compared."""
MOST_STEPS = 2000


class Logistic:
    """Minimises mean log loss + strength / (2 total) * weight², as scikit-learn does with C = 1 / strength. The bias is free.

    It works in the basis of `Basis`, each direction divided by the square root of the largest curvature that it can have (Böhning 1992):
    then all directions curve alike, and L-BFGS needs tens of steps in place of hundreds.
    """

    def __init__(self, basis: Basis, target_NK: Tensor, weight_N: Tensor) -> None:
        self.basis, self.target_NK, self.total = basis, target_NK, weight_N.sum()
        self.share_N = weight_N / self.total
        self.point_R1K = torch.zeros(len(basis.value_R) + 1, target_NK.shape[1], dtype=torch.float64)  # the bias last
        self.curve_R1 = torch.cat([basis.value_R, torch.ones(1, dtype=torch.float64)]) / 4

    def fit(self, strength: float, slope: float) -> None:
        """Move on from where the last fit ended, until no slope is larger than `slope`."""
        penalty = strength / self.total
        penalty_R11 = torch.full_like(self.curve_R1, float(penalty))[:, None]
        penalty_R11[-1] = 0.0
        unit_R11 = (self.curve_R1[:, None] + penalty_R11).rsqrt()
        point = (self.point_R1K / unit_R11).requires_grad_(True)
        search = torch.optim.LBFGS(
            [point], max_iter=MOST_STEPS, max_eval=2 * MOST_STEPS, tolerance_grad=slope, tolerance_change=0.0,
            history_size=20, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            with torch.no_grad():
                at_R1K = unit_R11 * point
                logit_NK = self.basis.rows_NR @ at_R1K[:-1] + at_R1K[-1]
                log_p_NK = logit_NK.log_softmax(1)
                value = -(self.share_N @ (self.target_NK * log_p_NK).sum(1)) + 0.5 * (penalty_R11 * at_R1K.square()).sum()
                wrong_NK = self.share_N[:, None] * (log_p_NK.exp() - self.target_NK)
                slope_R1K = torch.cat([self.basis.rows_NR.T @ wrong_NK, wrong_NK.sum(0, keepdim=True)])
                point.grad = unit_R11 * (slope_R1K + penalty_R11 * at_R1K)
            return value

        search.step(loss)
        self.point_R1K = (unit_R11 * point).detach()

    def logits(self, at_B: Tensor) -> Tensor:
        """What the fit says of the rows at these positions (B, K)."""
        return self.basis.rows_NR[at_B] @ self.point_R1K[:-1] + self.point_R1K[-1]

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """(weight (K, D), bias (K,)) on standardised features."""
        return (self.basis.vectors_DR @ self.point_R1K[:-1]).T, self.point_R1K[-1]
