"""Logistic regression in double precision: multinomial, or one for each of several labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tltrain.heads.standardised import Basis

STRENGTHS = tuple(10 ** (-k / 2) for k in range(13))
"""Penalties that are tried, by image, from strong to weak: 1 to 1e-6. The variance of a standardised column is 1."""
FINE, COARSE = 1e-7, 1e-4
"""Largest slope that is left, of the mean log loss: of the head that is handed on, and of those that are only compared."""
LOST = 1e-14
"""Change of the mean log loss, or of the largest coordinate, in which a step is lost in rounding: the search ends."""
ROUND, MOST_ROUNDS = 100, 20
"""Steps between two looks at the curvature, and the most such rounds."""
SUREST = 1e-6
"""p (1 - p) below which the curvature is not followed."""


class Logistic:
    """Minimises mean log loss + strength / (2 total) * weight², as scikit-learn does with C = 1 / strength. The bias is free.

    Of several labels the loss is the sum of those of each, so that each is fitted as if it were alone (one-vs-rest).

    It works in the basis of `Basis`, each direction divided by the square root of its curvature: then all directions curve about alike,
    and L-BFGS needs tens of steps in place of hundreds. Curvature is that of the features times p (1 - p) on average, at most 1/4
    (Böhning 1992); it shrinks as the fit grows sure, and so it is taken anew every `ROUND` steps.
    """

    def __init__(
        self, basis: Basis, target_NK: Tensor, weight_N: Tensor, alive: Callable[[], None] = lambda: None, several: bool = False
    ) -> None:
        """alive: called at each look at the loss; what it raises ends the fit. several: whether a row may have several labels, or none."""
        self.several = several
        self.alive, self.basis, self.target_NK, self.total = alive, basis, target_NK, weight_N.sum()
        self.share_N = weight_N / self.total
        self.point_R1K = torch.zeros(len(basis.value_R) + 1, target_NK.shape[1], dtype=torch.float64)  # the bias last
        self.value_R11 = torch.cat([basis.value_R, torch.ones(1, dtype=torch.float64)])[:, None]

    def fit(self, strength: float, slope: float) -> None:
        """Move on from where the last fit ended, until no slope is larger than `slope`. strength: scikit-learn's 1 / C."""
        penalty_R11 = torch.full_like(self.value_R11, strength / float(self.total))
        penalty_R11[-1] = 0.0
        for _ in range(MOST_ROUNDS):
            if self._round(penalty_R11, slope):
                return

    def _round(self, penalty_R11: Tensor, slope: float) -> bool:
        """Up to `ROUND` steps of L-BFGS. Returns whether no more are needed."""
        p_NK = self._look()[1]
        doubt_NK = p_NK * (1 - p_NK)  # labels are fitted each alone, and differ in it
        doubt_K = self.share_N @ doubt_NK if self.several else (self.share_N @ doubt_NK.sum(1) / p_NK.shape[1])[None]
        unit_R11 = (self.value_R11 * doubt_K.clamp_min(SUREST) + penalty_R11).rsqrt()
        point = (self.point_R1K / unit_R11).requires_grad_(True)
        search = torch.optim.LBFGS(
            [point], max_iter=ROUND, max_eval=2 * ROUND, tolerance_grad=slope, tolerance_change=LOST, history_size=20,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            self.alive()
            with torch.no_grad():
                self.point_R1K = unit_R11 * point
                loss_N, p_NK = self._look()
                value = 0.5 * (penalty_R11 * self.point_R1K.square()).sum() + self.share_N @ loss_N
                wrong_NK = self.share_N[:, None] * (p_NK - self.target_NK)
                slope_R1K = torch.cat([self.basis.rows_NR.T @ wrong_NK, wrong_NK.sum(0, keepdim=True)])
                point.grad = unit_R11 * (slope_R1K + penalty_R11 * self.point_R1K)
            return value

        search.step(loss)
        self.point_R1K = (unit_R11 * point).detach()
        return search.state[point]["n_iter"] < ROUND

    def _look(self) -> tuple[Tensor, Tensor]:
        """(the loss (N,), the probabilities (N, K))."""
        logits_NK = self.basis.rows_NR @ self.point_R1K[:-1] + self.point_R1K[-1]
        if self.several:
            return (F.softplus(logits_NK) - self.target_NK * logits_NK).sum(1), logits_NK.sigmoid()
        log_p_NK = logits_NK.log_softmax(1)
        return -(self.target_NK * log_p_NK).sum(1), log_p_NK.exp()

    def logits(self, at_B: Tensor) -> Tensor:
        """Logits (B, K) of the fit for the rows at these positions."""
        return self.basis.rows_NR[at_B] @ self.point_R1K[:-1] + self.point_R1K[-1]

    def loss(self, at_B: Tensor) -> Tensor:
        """Log loss (B,) of the rows at these positions."""
        logits_BK, target_BK = self.logits(at_B), self.target_NK[at_B]
        if self.several:
            return (F.softplus(logits_BK) - target_BK * logits_BK).sum(1)
        return -(target_BK * logits_BK.log_softmax(1)).sum(1)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """(weight (K, D), bias (K,)) on standardised features."""
        return (self.basis.vectors_DR @ self.point_R1K[:-1]).T, self.point_R1K[-1]
