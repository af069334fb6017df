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
    rows_N8 = _gathered(runtime, model, loader, partial(_row, temperature), entry, should_stop)
    index, label, predicted = (rows_N8[:, i].astype(np.int64) for i in (0, 2, 3))
    return Predictions(index, label, predicted, rows_N8[:, 4], rows_N8[:, 5], rows_N8[:, 6] > 0, rows_N8[:, 7], temperature)


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

    row: maps (logits, batch) to (B, C) float64. Its first two columns are index and weight; a weight of 0 marks padding.
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
    """(B, 8) float64: index, weight, label, predicted, confidence, loss, in the top five, calibrated confidence."""
    log_p_BK = logits_BK.double().log_softmax(1)
    calibrated_B = (logits_BK.double() / temperature).softmax(1).amax(1)
    confidence_B, predicted_B = log_p_BK.exp().max(1)
    label_B1 = batch["label"].unsqueeze(1)
    loss_B = -log_p_BK.gather(1, label_B1).squeeze(1)
    top5_B = (logits_BK.topk(min(5, logits_BK.shape[1])).indices == label_B1).any(1)
    columns = [predicted_B, confidence_B, loss_B, top5_B, calibrated_B]
    return torch.stack([batch["index"], batch["weight"], batch["label"], *columns], dim=1).double()


def _logits_row(logits_BK: Tensor, batch: Batch) -> Tensor:
    """(B, 3 + K) float64: index, weight, label, logits."""
    return torch.cat([torch.stack([batch[name].double() for name in ("index", "weight", "label")], dim=1), logits_BK.double()], dim=1)
