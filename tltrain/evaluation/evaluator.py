"""Batched forward passes over a split, gathered over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from tltrain.cache.frozen import WHOLE, InputAdapter
from tltrain.data.rendering import to_device
from tltrain.data.views import Batch
from tltrain.distributed.runtime import Runtime
from tltrain.evaluation.metrics import Predictions
from tltrain.models.precision import full_precision

COLUMNS = ("position", "weight", "label", "predicted", "confidence", "loss", "in_top5", "calibrated")
"""What is gathered of each sample. Probabilities of all classes would be K columns: 400 MB for 50,000 images of 1,000 classes."""


class Interrupted(Exception):
    """A stop was requested in the middle of a split. Raised on all processes."""


def predict(
    runtime: Runtime,
    model: nn.Module,
    loader: Iterable[Batch],
    temperature: float = 1.0,
    entry: InputAdapter = WHOLE,
    should_stop: Callable[[], bool] | None = None,
) -> Predictions:
    """Predictions of a model for a split, gathered over processes. Padding samples of the last batches are dropped. Collective.

    temperature: divides the logits of the calibrated confidence only.
    should_stop: called before each batch and must return the same on all processes. True raises Interrupted.
    """
    rows_NC = _gathered(runtime, model, loader, partial(_row, temperature), entry, should_stop)
    column_N = dict(zip(COLUMNS, rows_NC.T, strict=True))
    del column_N["weight"]
    whole = {name: column_N.pop(name).astype(np.int64) for name in ("position", "label", "predicted")}
    return Predictions(**whole, in_top5=column_N.pop("in_top5") > 0, **column_N, temperature=temperature)


def logits(
    runtime: Runtime, model: nn.Module, loader: Iterable[Batch], should_stop: Callable[[], bool] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(logits (N, K) float64, labels (N,) int64) of a model for a split, gathered as in `predict`. Collective."""
    rows_NC = _gathered(runtime, model, loader, _logits_row, should_stop=should_stop)
    return rows_NC[:, 3:], rows_NC[:, 2].astype(np.int64)


def _gathered(
    runtime: Runtime,
    model: nn.Module,
    loader: Iterable[Batch],
    row: Callable[[Tensor, Batch], Tensor],
    entry: InputAdapter = WHOLE,
    should_stop: Callable[[], bool] | None = None,
) -> np.ndarray:
    """(N, C): one row for each sample, ordered by position.

    row: maps (logits, batch) to (B, C) float64. Its first two columns are position and weight; a weight of 0 marks padding.
    """
    training = model.training
    model.eval()
    columns: list[Tensor] = []
    try:
        with torch.no_grad():
            for cpu_batch in loader:
                if should_stop is not None and should_stop():
                    raise Interrupted
                batch = to_device(cpu_batch, runtime.device)
                inputs = entry(batch)
                with runtime.accelerator.autocast():
                    logits_BK = model(*inputs)
                columns.append(row(full_precision(logits_BK), batch))
    finally:
        model.train(training)
    rows_NC = runtime.gather(torch.cat(columns)).cpu().numpy()
    rows_NC = rows_NC[rows_NC[:, 1] > 0]
    return rows_NC[np.argsort(rows_NC[:, 0], kind="stable")]


def _row(temperature: float, logits_BK: Tensor, batch: Batch) -> Tensor:
    """(B, C) float64, a column for each name of COLUMNS."""
    log_p_BK = logits_BK.double().log_softmax(1)
    calibrated_B = (logits_BK.double() / temperature).softmax(1).amax(1)
    confidence_B, predicted_B = log_p_BK.exp().max(1)
    label_B1 = batch["label"].unsqueeze(1)
    loss_B = -log_p_BK.gather(1, label_B1).squeeze(1)
    top5_B = (logits_BK.topk(min(5, logits_BK.shape[1])).indices == label_B1).any(1)
    column_B = {
        "position": batch["position"], "weight": batch["weight"], "label": batch["label"], "predicted": predicted_B,
        "confidence": confidence_B, "loss": loss_B, "in_top5": top5_B, "calibrated": calibrated_B,
    }  # fmt: skip
    return torch.stack([column_B[name] for name in COLUMNS], dim=1).double()


def _logits_row(logits_BK: Tensor, batch: Batch) -> Tensor:
    """(B, 3 + K) float64: position, weight, label, logits."""
    return torch.cat([torch.stack([batch[name].double() for name in ("position", "weight", "label")], dim=1), logits_BK.double()], dim=1)
