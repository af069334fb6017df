"""A loss that is not finite: its error, the check of an evaluation, and the watch over the losses of steps."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from tltrain.core.stage_plan import StagePlan
from tltrain.distributed.runtime import Runtime
from tltrain.evaluation.metrics import Predictions
from tltrain.evaluation.multilabel.predictions import LabelPredictions


class NotFinite(RuntimeError):
    """A loss is infinite or NaN. Every process raises the same error."""

    def __init__(self, whose: str, loss: float, stage: StagePlan, step: int, rank: int = 0) -> None:
        """step: the optimizer step of the loss. For an evaluation: the number of steps before it."""
        lr = stage.lr * stage.lr_factor(min(step, stage.num_steps - 1))
        said = f"the {whose} became {loss} in stage {stage.spec.name}, step {step}, at learning rate {lr:.3g}"
        if stage.features is not None:
            said += " (so it does where the teacher's features exceed 65,504 and are kept in float16: set distill.logits: float32)"
        super().__init__(said)
        self.rank, self.step = rank, step


def check_finite(predictions: Predictions | LabelPredictions, split: str, stage: StagePlan, step: int) -> None:
    """Raise NotFinite if the mean loss on a split is not finite.

    The training loss cannot show this for the last update: it was computed before that update.
    """
    loss = float(predictions.loss.mean())
    if not math.isfinite(loss):
        raise NotFinite(f"{split} loss", loss, stage, step)


class LossWatch:
    """The losses of steps on their way to the host. Each is checked once it is there: no step waits for the device."""

    def __init__(self, step: int) -> None:
        self.bad, self.bad_at = 0, (step, float("nan"))
        """1 once a loss was not finite; the step and the loss."""
        self.pending: deque[tuple[int, Tensor, Any]] = deque()

    def add(self, step: int, share: Tensor) -> None:
        """Copy a step's loss to the host asynchronously."""
        on_host, event = share, None
        if share.device.type == "cuda":
            on_host = torch.empty_like(share, device="cpu", pin_memory=True)
            on_host.copy_(share, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, on_host, event))
        self._look(wait=False)

    def settle(self) -> int:
        """Wait until all losses are on the host. Returns 1 if one was not finite, else 0."""
        self._look(wait=True)
        return self.bad

    def error(self, runtime: Runtime, stage: StagePlan) -> NotFinite:
        """The error of the first process whose loss was not finite. Collective."""
        mine = torch.tensor([[self.bad, *self.bad_at]], dtype=torch.float64, device=runtime.device)
        rows_R3 = runtime.gather(mine).tolist()
        rank = next(r for r, row in enumerate(rows_R3) if row[0])
        step, loss = int(rows_R3[rank][1]), rows_R3[rank][2]
        whose = f"loss of rank {rank}" if runtime.world > 1 else "loss"
        return NotFinite(whose, loss, stage, step, rank)

    def _look(self, wait: bool) -> None:
        """Check the losses that have reached the host. wait: wait for those that have not."""
        while self.pending:
            step, share, event = self.pending[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self.pending.popleft()
            loss = share.item()
            if not self.bad and not math.isfinite(loss):
                self.bad, self.bad_at = 1, (step, loss)
