"""Batched forward passes over a split, gathered over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from tltrain.cache.frozen import WHOLE, InputAdapter
from tltrain.data.rendering import to_device
from tltrain.data.views import Batch
from tltrain.distributed.runtime import Runtime
from tltrain.evaluation.metrics import Predictions
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.models.precision import full_precision

COLUMNS = ("position", "weight", "label", "predicted", "confidence", "loss", "in_top5", "calibrated", "own")
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
    thresholds: Sequence[float] = (),
) -> Predictions:
    """Predictions of a model for a split, gathered over processes. Padding samples of the last batches are dropped. Collective.

    temperature: divides the logits of calibrated probabilities only.
    should_stop: called before each batch and must return the same on all processes. True raises Interrupted.
    thresholds: calibrated probabilities; `Predictions.set_sizes` counts the classes that reach each.
    """
    rows_NC = _gathered(runtime, model, loader, partial(_row, temperature, thresholds), entry, should_stop)
    return _predictions(rows_NC, temperature)


def answers(
    runtime: Runtime,
    model: nn.Module,
    loader: Iterable[Batch],
    temperature: float = 1.0,
    entry: InputAdapter = WHOLE,
    should_stop: Callable[[], bool] | None = None,
    thresholds: Sequence[float] = (),
) -> Predictions | LabelPredictions:
    """As `predict`, for images with one class each or with several labels, as their batches say. Collective.

    The signature of `predict` stands here again, so that types are checked at every call of either.
    """
    several = False

    def row(logits_BK: Tensor, batch: Batch) -> Tensor:
        nonlocal several
        several = batch["label"].ndim == 2
        return _label_row(logits_BK, batch) if several else _row(temperature, thresholds, logits_BK, batch)

    rows_NC = _gathered(runtime, model, loader, row, entry, should_stop)
    if not several:
        return _predictions(rows_NC, temperature)
    target_NK, logit_NK = np.split(rows_NC[:, 2:], 2, axis=1)
    return LabelPredictions(rows_NC[:, 0].astype(np.int64), target_NK > 0, logit_NK, temperature)


def predict_views(
    runtime: Runtime, model: nn.Module, loader: Iterable[Batch], num_views: int, temperature: float = 1.0, thresholds: Sequence[float] = ()
) -> tuple[Predictions, Predictions]:
    """As `predict`: (predictions of the mean over the views of each sample, those of view 0 alone). Collective.

    loader: as `eval_views_loader` makes it: the views of a sample stand one after the other.
    """
    rows_NC = _gathered(runtime, model, loader, partial(_views_row, num_views, temperature, thresholds))
    width = rows_NC.shape[1] // 2
    return _predictions(rows_NC[:, :width], temperature), _predictions(rows_NC[:, width:], temperature)


def _predictions(rows_NC: np.ndarray, temperature: float) -> Predictions:
    """rows_NC: as `_row` makes them, without padding."""
    column_N = dict(zip(COLUMNS, rows_NC.T[: len(COLUMNS)], strict=True))
    del column_N["weight"]
    whole = {name: column_N.pop(name).astype(np.int64) for name in ("position", "label", "predicted")}
    sizes_NT = rows_NC[:, len(COLUMNS) :].astype(np.int64)
    return Predictions(**whole, in_top5=column_N.pop("in_top5") > 0, **column_N, temperature=temperature, set_sizes=sizes_NT)


def logits(
    runtime: Runtime, model: nn.Module, loader: Iterable[Batch], should_stop: Callable[[], bool] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(logits (N, K) float64, labels (N,) int64) of a model for a split, gathered as in `predict`. Collective."""
    rows_NC = _gathered(runtime, model, loader, _logits_row, should_stop=should_stop)
    return rows_NC[:, 3:], rows_NC[:, 2].astype(np.int64)


def features(runtime: Runtime, model: nn.Module, head: str, loader: Iterable[Batch]) -> np.ndarray:
    """The head's input features (N, D), float32, of a split, gathered as in `predict`. Collective.

    model: a chain; its net is run whole, or block by block, as it always is. head: path of the classifier in the net.
    """
    given: list[Tensor] = []
    hook = model.get_submodule(f"net.{head}").register_forward_pre_hook(lambda _, args: given.append(vector(args[0])))
    try:
        rows_NC = _gathered(runtime, model, loader, lambda _, batch: _logits_row(given.pop(), batch))
    finally:
        hook.remove()
    return rows_NC[:, 3:].astype(np.float32)


def vector(x: Tensor) -> Tensor:
    """A head's input as (B, D). Maps (B, D, H, W), which a convolution takes, are averaged over space."""
    return x if x.ndim == 2 else x.flatten(2).mean(2)


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


def _row(temperature: float, thresholds: Sequence[float], logits_BK: Tensor, batch: Batch) -> Tensor:
    """(B, C) float64, a column for each name of COLUMNS, then one for each threshold."""
    return _columns(logits_BK, logits_BK.double().log_softmax(1), (logits_BK.double() / temperature).softmax(1), thresholds, batch)


def _views_row(num_views: int, temperature: float, thresholds: Sequence[float], logits_BK: Tensor, batch: Batch) -> Tensor:
    """(B / num_views, 2 C): `_row` of the mean over views, then `_row` of view 0."""
    first = {name: tensor[::num_views] for name, tensor in batch.items()}
    mean_BK = mean_over_views(logits_BK.double().softmax(1), num_views).log()
    calibrated_BK = mean_over_views((logits_BK.double() / temperature).softmax(1), num_views)
    return torch.cat(
        [_columns(mean_BK, mean_BK, calibrated_BK, thresholds, first), _row(temperature, thresholds, logits_BK[::num_views], first)], 1
    )


def mean_over_views(p_BK: Tensor, num_views: int) -> Tensor:
    """(B, K) -> (B / num_views, K): the mean of the probabilities of each sample's views, which stand one after the other.

    Of probabilities, not of their logarithms: a view that cuts the object off makes the true class nearly impossible, and a mean of
    logarithms would let that one view veto all others. Either mean's loss is at most the mean loss of its views (Jensen).
    """
    return p_BK.unflatten(0, (-1, num_views)).mean(1)


def _columns(score_BK: Tensor, log_p_BK: Tensor, calibrated_BK: Tensor, thresholds: Sequence[float], batch: Batch) -> Tensor:
    """(B, C) float64 as `_row`. score_BK: orders the classes."""
    confidence_B, predicted_B = log_p_BK.exp().max(1)
    label_B1 = batch["label"].unsqueeze(1)
    loss_B = -log_p_BK.gather(1, label_B1).squeeze(1)
    top5_B = (score_BK.topk(min(5, score_BK.shape[1])).indices == label_B1).any(1)
    column_B = {
        "position": batch["position"], "weight": batch["weight"], "label": batch["label"], "predicted": predicted_B,
        "confidence": confidence_B, "loss": loss_B, "in_top5": top5_B, "calibrated": calibrated_BK.amax(1),
        "own": calibrated_BK.gather(1, label_B1).squeeze(1),
    }  # fmt: skip
    sizes = [(calibrated_BK >= threshold).sum(1).clamp_min(1) for threshold in thresholds]
    return torch.stack([*(column_B[name] for name in COLUMNS), *sizes], dim=1).double()


def _label_row(logits_BK: Tensor, batch: Batch) -> Tensor:
    """(B, 2 + 2 K) float64: position, weight, the labels (1 where an image has a class), logits."""
    where = torch.stack([batch["position"].double(), batch["weight"].double()], dim=1)
    return torch.cat([where, batch["label"].double(), logits_BK.double()], dim=1)


def _logits_row(logits_BK: Tensor, batch: Batch) -> Tensor:
    """(B, 3 + K) float64: position, weight, label, logits."""
    return torch.cat([torch.stack([batch[name].double() for name in ("position", "weight", "label")], dim=1), logits_BK.double()], dim=1)
