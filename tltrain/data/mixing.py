"""Mixup and CutMix, applied to a batch."""

from __future__ import annotations

import torch

from tltrain.data.views import Batch


def apply_mixup(batch: Batch) -> Batch:
    """The batch with each image mixed with its partner: floats (B, 3, S, S) in [0, 1]. A batch without partners is returned as it is."""
    if "partner_image" not in batch:
        return batch
    x_BCHW, y_BCHW = batch["image"].float() / 255, batch["partner_image"].float() / 255
    lam = batch["lam"].view(-1, 1, 1, 1)
    top, left, bottom, right = (batch["box"][:, i].view(-1, 1, 1, 1) for i in range(4))
    rows = torch.arange(x_BCHW.shape[2], device=x_BCHW.device).view(1, 1, -1, 1)
    columns = torch.arange(x_BCHW.shape[3], device=x_BCHW.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return {**batch, "image": torch.where(bottom > top, torch.where(inside, y_BCHW, x_BCHW), lam * x_BCHW + (1 - lam) * y_BCHW)}
