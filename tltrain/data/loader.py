"""Data loaders for training and evaluation: the micro-batches of each rank at each step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tltrain.data.rendering import to_device
from tltrain.data.sampler import FiniteMixing, SampleRef, SampleStream, Shard, micro_batches, rank_slice
from tltrain.data.views import Batch, Views
from tltrain.data.workers import Loader, fitting, shared_batch, worker_options


@dataclass(frozen=True)
class StepSampler:
    """Batch sampler: for each step from start to stop (exclusive), the micro-batches of this rank."""

    stream: SampleStream
    start: int
    stop: int
    shard: Shard

    def __len__(self) -> int:
        return (self.stop - self.start) * self.shard.num_micro

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for s in range(self.start, self.stop):
            items = self.stream.step(s)
            local_items = items[self.shard.local(len(items))]
            # a rank without samples gets one with weight 0, so that every rank runs the same number of forward passes
            yield from micro_batches(local_items or [items[0]._replace(weight=0.0)], self.shard.num_micro)


def train_loader(views: Views, stream: SampleStream, start_step: int, stop_step: int, shard: Shard, workers: int, pin: bool) -> Loader:
    """Training batches of this rank, shard.num_micro for each step, as `Views.batch` makes them."""
    return _loader(views, StepSampler(stream, start_step, stop_step, shard), workers, pin)


def item_loader(views: Views, batches: Sequence[list[SampleRef]], workers: int, pin: bool) -> Loader:
    """Loads the given batches of samples in order."""
    return _loader(views, batches, workers, pin)


def train_positions(
    labels: np.ndarray, stream: SampleStream, start_step: int, stop_step: int, shard: Shard, mixing: FiniteMixing | None = None
) -> Iterator[Batch]:
    """As train_loader without the images: label, weight, position and view; partner_label and lam. For training on cached features."""
    local = range(stream.batch)[shard.local(stream.batch)]
    parts = [local[rank_slice(len(local), i, shard.num_micro)] for i in range(shard.num_micro)]
    filled = [part or local[:1] or range(1) for part in parts]  # an empty part becomes one sample with weight 0, as in StepSampler
    for s in range(start_step, stop_step):
        position_B, view_B = (torch.from_numpy(array_B) for array_B in stream.positions(s))
        label_B = torch.from_numpy(labels[position_B.numpy()])
        mixed = {} if mixing is None else _mixed_labels(labels, mixing, position_B, view_B)
        for part, full in zip(parts, filled, strict=True):
            at = slice(full.start, full.stop)
            yield {
                "label": label_B[at],
                "weight": torch.full((len(full),), float(bool(part))),
                "position": position_B[at],
                "view": view_B[at],
                **{name: value_B[at] for name, value_B in mixed.items()},
            }


def _mixed_labels(labels: np.ndarray, mixing: FiniteMixing, position_B: torch.Tensor, view_B: torch.Tensor) -> Batch:
    """Labels and shares of the partners of mixed views as in `Views.batch`, without their pixels."""
    items = mixing.mixed([SampleRef(i, v) for i, v in zip(position_B.tolist(), view_B.tolist(), strict=True)])
    partner_label_B = torch.from_numpy(labels[[item.partner for item in items]])
    return {"partner_label": partner_label_B, "lam": torch.tensor([item.lam for item in items])}


def eval_positions(labels: np.ndarray, shard: Shard, batch: int, limit: int | None) -> list[Batch]:
    """As eval_loader without the images: label, weight, position and view."""
    return list(_positions(labels, eval_batches(len(labels), shard, batch, limit)))


def _positions(labels: np.ndarray, batches: Iterable[list[SampleRef]]) -> Iterator[Batch]:
    for items in batches:
        position_B = np.array([item.position for item in items])
        yield {
            "label": torch.from_numpy(labels[position_B]),
            "weight": torch.tensor([item.weight for item in items]),
            "position": torch.from_numpy(position_B),
            "view": torch.tensor([item.view for item in items]),
        }


def eval_loader(views: Views, shard: Shard, batch: int, limit: int | None, workers: int, pin: bool) -> Loader:
    """View 0 of every sample once over all ranks, in batches of at most `batch`.

    Every rank gets the same number of batches of the same size. Padding samples have weight 0.
    limit: evaluate only this many samples, spread evenly over the split because it may be sorted by class. None: all.
    """
    return _loader(views, eval_batches(len(views), shard, batch, limit), workers, pin)


def eval_views_loader(views: Views, num_views: int, shard: Shard, batch: int, limit: int | None, workers: int, pin: bool) -> Loader:
    """As eval_loader, of the views 0 to num_views - 1 of every sample, one after the other. batch: images, at least one sample."""
    samples = eval_batches(len(views), shard, max(1, batch // num_views), limit)
    return _loader(views, [[item._replace(view=v) for item in items for v in range(num_views)] for items in samples], workers, pin)


def evaluated(num_samples: int, limit: int | None) -> list[int]:
    """The positions in a split that are evaluated: at most `limit`, spread evenly."""
    num = min(num_samples, limit or num_samples)
    return [i * num_samples // num for i in range(num)]


def eval_batches(num_samples: int, shard: Shard, batch: int, limit: int | None) -> list[list[SampleRef]]:
    """The batches of `eval_loader` for this rank: view 0 of each sample, padded with samples of weight 0."""
    positions = evaluated(num_samples, limit)
    num = len(positions)
    per_rank = math.ceil(num / shard.world)
    num_batches = math.ceil(per_rank / batch)
    size = math.ceil(per_rank / num_batches)
    items = [SampleRef(p, 0) for p in positions]
    items += [SampleRef(positions[0], 0, weight=0.0)] * (num_batches * size * shard.world - num)
    local_items = items[shard.rank :: shard.world]
    return [local_items[b * size : (b + 1) * size] for b in range(num_batches)]


def _loader(views: Views, batches: StepSampler | Sequence[list[SampleRef]], workers: int, pin: bool) -> Loader:
    options = worker_options(fitting(workers, _batch_bytes(views, batches)))
    return Loader(views, batch_sampler=batches, collate_fn=shared_batch, pin_memory=pin, **options)


def _batch_bytes(views: Views, batches: StepSampler | Sequence[list[SampleRef]]) -> int:
    """About what a batch takes in shared memory: its images, and as many partners where images are mixed."""
    if isinstance(batches, StepSampler):
        num = 2 * math.ceil(batches.stream.batch / (batches.shard.world * batches.shard.num_micro))
    else:
        num = max(map(len, batches), default=0) * (1 if views.mixing is None else 2)
    return num * 3 * views.preprocess.resize**2


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Moves batches to the device. On a GPU the next batch is copied while the current one is used."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    source, copy_stream, compute_stream = iter(batches), torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch() -> Batch | None:
        with torch.cuda.stream(copy_stream):
            batch = next(source, None)
            return None if batch is None else to_device(batch, device)

    prefetched = fetch()
    while prefetched is not None:
        compute_stream.wait_stream(copy_stream)
        batch = prefetched
        for tensor in batch.values():
            tensor.record_stream(compute_stream)  # the copy stream may not reuse its memory before it has been read
        prefetched = fetch()
        yield batch
