"""What a network says of images: batches, mixing, and predictions gathered over processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from tltrain.data.rendering import to_device
from tltrain.distributed.out_of_memory import ChunkTooLarge, is_out_of_memory
from tltrain.distributed.runtime import Runtime
from tltrain.evaluation.metrics import Predictions
from tltrain.models.chain import Chain
from tltrain.training.losses.objective import full_precision

Batch = dict[str, Tensor]
FEATURES, TEACHER = "features", "teacher"
"""What a batch holds beside, or in place of, its images: what a frozen prefix, or a teacher, says of them."""


class Interrupted(Exception):
    """Somebody asked all processes to stop, in the middle of a split."""


@dataclass(frozen=True)
class FrozenModel:
    """What does not change in a stage: the first blocks of a student, or a whole teacher.

    Its output is rounded to one dtype, and computed in chunks of one size, the last padded: what it says of an image depends
    neither on the images beside it nor on when it is asked, and a stored answer is bit for bit the one computed now.
    """

    chain: Chain
    stop: int | None
    """The first block that it does not run; None runs all."""
    dtype: torch.dtype | None
    """None leaves what comes out as it is."""
    chunk: int | None
    """None runs a batch as it is: for answers that nobody could store."""
    autocast: Callable[[], AbstractContextManager[None]]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), uint8 or floats in [0, 1] -> (B, ...)."""
        with torch.no_grad(), self.autocast():
            if self.chunk is None:
                out = self.chain.forward(images, stop=self.stop)
            else:
                parts = [self._padded(part, self.chunk) for part in images.split(self.chunk)]
                out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out.to(self.dtype).contiguous()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the parameters and buffers of its blocks, read once: every store of a stage asks for it."""
        state = hashlib.blake2b(digest_size=16)
        for i in range(len(self.chain.blocks[: self.stop])):
            buffers = ((f"{name}.{key}", b) for name, module in self.chain.modules_of(i) for key, b in module.named_buffers(recurse=False))
            for name, tensor in (*self.chain.parameters_of(i), *buffers):
                state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return state.hexdigest()

    def _padded(self, part: Tensor, chunk: int) -> Tensor:
        n = len(part)
        try:
            if n < chunk:
                part = torch.cat([part, part.new_zeros((chunk - n, *part.shape[1:]))])
            return self.chain.forward(part, stop=self.stop)[:n]  # not through a call, which may be compiled for training
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise ChunkTooLarge(error, chunk) from error
            raise


@dataclass(frozen=True)
class InputAdapter:
    """Where batches enter a model: as images at its first block, or behind a frozen prefix."""

    prefix: FrozenModel | None = None
    cut: int = 0
    """The first block behind the prefix."""

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        """(what the model is given, the block it starts with)."""
        if FEATURES in batch:
            return batch[FEATURES], self.cut
        images = batch["image"]
        return (images, 0) if self.prefix is None else (self.prefix(images), self.cut)


def predict(
    runtime: Runtime,
    model: nn.Module,
    loader: Iterable[Batch],
    temperature: float = 1.0,
    entry: InputAdapter = InputAdapter(),
    asked: Callable[[], bool] | None = None,
) -> Predictions:
    """Predictions of a model for a split, gathered over processes; samples that only fill up the last batches are dropped.

    temperature: of the calibrated confidence; the rest is what the model itself says. asked: called before each batch, by all
    processes alike; True raises Interrupted.
    """
    rows_N8 = _gathered(runtime, model, loader, partial(_row, temperature), entry, asked)
    index, label, predicted = (rows_N8[:, i].astype(np.int64) for i in (0, 2, 3))
    return Predictions(index, label, predicted, rows_N8[:, 4], rows_N8[:, 5], rows_N8[:, 6] > 0, rows_N8[:, 7], temperature)


def logits(
    runtime: Runtime, model: nn.Module, loader: Iterable[Batch], asked: Callable[[], bool] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(logits (N, K) float64, labels (N,) int64) of a model for a split, gathered as in `predict`."""
    rows_NC = _gathered(runtime, model, loader, _logits_row, asked=asked)
    return rows_NC[:, 3:], rows_NC[:, 2].astype(np.int64)


def _gathered(
    runtime: Runtime,
    model: nn.Module,
    loader: Iterable[Batch],
    row: Callable[[Tensor, Batch], Tensor],
    entry: InputAdapter = InputAdapter(),
    asked: Callable[[], bool] | None = None,
) -> np.ndarray:
    """One row a sample, ordered by position. row: (logits, batch) to (B, C) float64 that begins with index and weight."""
    training = model.training
    model.eval()
    columns: list[Tensor] = []
    try:
        with torch.no_grad():
            for cpu_batch in loader:
                if asked is not None and asked():
                    raise Interrupted
                batch = to_device(cpu_batch, runtime.device)
                given = entry(batch)
                with runtime.accelerator.autocast():
                    logits_BK = model(*given)
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
    said = [predicted_B, confidence_B, loss_B, top5_B, calibrated_B]
    return torch.stack([batch["index"], batch["weight"], batch["label"], *said], dim=1).double()


def _logits_row(logits_BK: Tensor, batch: Batch) -> Tensor:
    """(B, 3 + K) float64: index, weight, label, logits."""
    return torch.cat([torch.stack([batch[name].double() for name in ("index", "weight", "label")], dim=1), logits_BK.double()], dim=1)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device; on a GPU the next one travels while this one is worked on."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    source, side, here = iter(batches), torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch() -> Batch | None:
        with torch.cuda.stream(side):
            batch = next(source, None)
            return None if batch is None else to_device(batch, device)

    coming = fetch()
    while coming is not None:
        here.wait_stream(side)
        batch = coming
        for tensor in batch.values():
            tensor.record_stream(here)  # its memory is not given to the side stream again before it was read here
        coming = fetch()
        yield batch


def apply_mixup(batch: Batch) -> Batch:
    """The batch with the images that the net and the teacher see: as loaded (uint8), or mixed with their partners (floats in [0, 1])."""
    if "partner_image" not in batch:
        return batch
    x_BCHW, y_BCHW = batch["image"].float() / 255, batch["partner_image"].float() / 255
    lam = batch["lam"].view(-1, 1, 1, 1)
    top, left, bottom, right = (batch["box"][:, i].view(-1, 1, 1, 1) for i in range(4))
    rows = torch.arange(x_BCHW.shape[2], device=x_BCHW.device).view(1, 1, -1, 1)
    columns = torch.arange(x_BCHW.shape[3], device=x_BCHW.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return {**batch, "image": torch.where(bottom > top, torch.where(inside, y_BCHW, x_BCHW), lam * x_BCHW + (1 - lam) * y_BCHW)}
