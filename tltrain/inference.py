"""What a network says of images: batches, mixing, and predictions gathered over processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tltrain.losses import full_precision
from tltrain.metrics import Predictions
from tltrain.runtime import Runtime

Batch = dict[str, Tensor]


def predict(runtime: Runtime, model: nn.Module, loader: DataLoader[Batch], temperature: float = 1.0) -> Predictions:
    """Predictions of a model for a split, gathered over processes; samples that only fill up the last batches are dropped.

    temperature: of the calibrated confidence; the rest is what the model itself says.
    """
    rows_N8 = _gathered(runtime, model, loader, partial(_row, temperature))
    index, label, predicted = (rows_N8[:, i].astype(np.int64) for i in (0, 2, 3))
    return Predictions(index, label, predicted, rows_N8[:, 4], rows_N8[:, 5], rows_N8[:, 6] > 0, rows_N8[:, 7], temperature)


def logits(runtime: Runtime, model: nn.Module, loader: DataLoader[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """(logits (N, K) float64, labels (N,) int64) of a model for a split, gathered as in `predict`."""
    rows_NC = _gathered(runtime, model, loader, _logits_row)
    return rows_NC[:, 3:], rows_NC[:, 2].astype(np.int64)


def _gathered(runtime: Runtime, model: nn.Module, loader: DataLoader[Batch], row: Callable[[Tensor, Batch], Tensor]) -> np.ndarray:
    """One row a sample, ordered by position. row: (logits, batch) to (B, C) float64 that begins with index and weight."""
    training = model.training
    model.eval()
    columns: list[Tensor] = []
    with torch.no_grad():
        for cpu_batch in loader:
            batch = to_device(cpu_batch, runtime.device)
            with runtime.accelerator.autocast():
                logits_BK = model(batch["image"])
            columns.append(row(full_precision(logits_BK), batch))
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
    said = [predicted_B, confidence_B, loss_B, top5_B, calibrated_B]
    return torch.stack([batch["index"], batch["weight"], batch["label"], *said], dim=1).double()


def _logits_row(logits_BK: Tensor, batch: Batch) -> Tensor:
    """(B, 3 + K) float64: index, weight, label, logits."""
    return torch.cat([torch.stack([batch[name].double() for name in ("index", "weight", "label")], dim=1), logits_BK.double()], dim=1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def mixed_images(batch: Batch) -> Tensor:
    """The images the net and the teacher see: as loaded (uint8), or mixed with their partners (floats in [0, 1])."""
    x_BCHW = batch["image"]
    if "partner_image" not in batch:
        return x_BCHW
    x_BCHW, y_BCHW = x_BCHW.float() / 255, batch["partner_image"].float() / 255
    lam = batch["lam"].view(-1, 1, 1, 1)
    top, left, bottom, right = (batch["box"][:, i].view(-1, 1, 1, 1) for i in range(4))
    rows = torch.arange(x_BCHW.shape[2], device=x_BCHW.device).view(1, 1, -1, 1)
    columns = torch.arange(x_BCHW.shape[3], device=x_BCHW.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return torch.where(bottom > top, torch.where(inside, y_BCHW, x_BCHW), lam * x_BCHW + (1 - lam) * y_BCHW)
