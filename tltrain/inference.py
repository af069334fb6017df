"""What a network says of images: batches, mixing, and predictions gathered over processes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tltrain.losses import full_precision
from tltrain.metrics import Predictions
from tltrain.runtime import Runtime

Batch = dict[str, Tensor]


def predict(runtime: Runtime, model: nn.Module, loader: DataLoader[Batch]) -> Predictions:
    """Predictions of a model for a split, gathered over processes; samples that only fill up the last batches are dropped."""
    training = model.training
    model.eval()
    columns: list[Tensor] = []
    with torch.no_grad():
        for cpu_batch in loader:
            batch = to_device(cpu_batch, runtime.device)
            with runtime.accelerator.autocast():
                logits_BK = model(batch["image"])
            columns.append(_row(full_precision(logits_BK), batch))
    model.train(training)
    rows_N7 = runtime.gather(torch.cat(columns)).cpu().numpy()
    rows_N7 = rows_N7[rows_N7[:, 6] > 0]
    rows_N7 = rows_N7[np.argsort(rows_N7[:, 0], kind="stable")]
    index, label, predicted = (rows_N7[:, i].astype(np.int64) for i in range(3))
    return Predictions(index, label, predicted, rows_N7[:, 3], rows_N7[:, 4], rows_N7[:, 5] > 0)


def _row(logits_BK: Tensor, batch: Batch) -> Tensor:
    """(B, 7) float64: index, label, predicted, confidence, loss, in the top five, weight."""
    log_p_BK = logits_BK.double().log_softmax(1)
    confidence_B, predicted_B = log_p_BK.exp().max(1)
    label_B1 = batch["label"].unsqueeze(1)
    loss_B = -log_p_BK.gather(1, label_B1).squeeze(1)
    top5_B = (logits_BK.topk(min(5, logits_BK.shape[1])).indices == label_B1).any(1)
    return torch.stack([batch["index"], batch["label"], predicted_B, confidence_B, loss_B, top5_B, batch["weight"]], dim=1).double()


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
