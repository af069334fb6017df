"""The views that a stage trains on, and Mixup and CutMix of their pixels."""

from __future__ import annotations

import torch

from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data.dataset import Split, sampling_weights
from tltrain.data.sampler import FiniteMixing
from tltrain.data.views import BaseImages, Batch, Preprocess, Views


def stage_views(
    recipe: Recipe, stage: StagePlan | None, split: Split, preprocess: Preprocess, bases: BaseImages | None = None, on_device: bool = False
) -> Views:
    """The views of a split that a stage trains on. stage None: the evaluation view alone. bases, on_device: as in `Views`."""
    data = recipe.data
    if stage is None:
        return Views(split, preprocess, "none", data.flip, data.seed, bases, on_device)
    mixing = _finite_mixing(recipe, stage, split, preprocess.size) if stage.mixes_by_view else None
    return Views(split, preprocess, stage.spec.augment, data.flip, data.seed, bases, on_device, stage.spec.erasing, mixing)


def _finite_mixing(recipe: Recipe, stage: StagePlan, split: Split, size: int) -> FiniteMixing:
    weight_N = None
    if recipe.data.balance == "sampler":  # partners are as balanced as the images that they are mixed with
        weight_N = sampling_weights(split.labels, int(split.labels.max()) + 1)
    return FiniteMixing(recipe.data.seed, split.source_index, stage.spec.mixup, stage.spec.cutmix, size, weight_N)


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
