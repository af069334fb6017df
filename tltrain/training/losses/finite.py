"""A loss that is not finite: its error, and the check of an evaluation."""

from __future__ import annotations

import math

from tltrain.core.stage_plan import StagePlan
from tltrain.evaluation.metrics import Predictions


class NotFinite(RuntimeError):
    """A loss is infinite or NaN. Every process raises the same error."""

    def __init__(self, whose: str, loss: float, stage: StagePlan, step: int, rank: int = 0) -> None:
        """step: the optimizer step of the loss. For an evaluation: the number of steps before it."""
        lr = stage.spec.lr * stage.lr_factor(min(step, stage.num_steps - 1))
        super().__init__(f"the {whose} became {loss} in stage {stage.spec.name}, step {step}, at learning rate {lr:.3g}")
        self.rank, self.step = rank, step


def check_finite(predictions: Predictions, split: str, stage: StagePlan, step: int) -> None:
    """Raise NotFinite if the mean loss on a split is not finite.

    The training loss cannot show this for the last update: it was computed before that update.
    """
    loss = float(predictions.loss.mean())
    if not math.isfinite(loss):
        raise NotFinite(f"{split} loss", loss, stage, step)
