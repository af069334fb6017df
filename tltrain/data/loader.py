"""Data loaders: what each rank reads at each step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tltrain.data.rendering import to_device
from tltrain.data.sampler import SampleRef, SampleStream, micro_batches, rank_slice
from tltrain.data.views import Batch, Views, batches_as_they_are
from tltrain.data.workers import Loader, worker_options


@dataclass(frozen=True)
class StepSampler:
    """For each step from start to stop (exclusive), this rank's micro-batches: num_micro lists of items."""

    stream: SampleStream
    start: int
    stop: int
    rank: int
    world: int
    num_micro: int

    def __len__(self) -> int:
        return (self.stop - self.start) * self.num_micro

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for s in range(self.start, self.stop):
            items = self.stream.step(s)
            mine = items[rank_slice(len(items), self.rank, self.world)]
            yield from micro_batches(mine or [items[0]._replace(weight=0.0)], self.num_micro)


def train_loader(
    views: Views, stream: SampleStream, start_step: int, stop_step: int, rank: int, world: int, num_micro: int, workers: int, pin: bool
) -> Loader:
    """Batches of this rank, num_micro for each step: dictionaries as Views makes them, stacked."""
    return _loader(views, StepSampler(stream, start_step, stop_step, rank, world, num_micro), workers, pin)


def item_loader(views: Views, batches: Sequence[list[SampleRef]], workers: int, pin: bool) -> Loader:
    """These items, batch by batch."""
    return _loader(views, batches, workers, pin)


def train_positions(
    labels: np.ndarray, stream: SampleStream, start_step: int, stop_step: int, rank: int, world: int, num_micro: int
) -> Iterator[Batch]:
    """As train_loader without the images: label, weight, index and view, for those who look the rest up."""
    places = range(stream.batch)[rank_slice(stream.batch, rank, world)]
    parts = [places[rank_slice(len(places), i, num_micro)] for i in range(num_micro)]
    filled = [part or places[:1] or range(1) for part in parts]  # in place of an empty part one sample with weight 0, as StepSampler has it
    for s in range(start_step, stop_step):
        index_B, view_B = (torch.from_numpy(array_B) for array_B in stream.positions(s))
        label_B = torch.from_numpy(labels[index_B.numpy()])
        for part, full in zip(parts, filled, strict=True):
            at = slice(full.start, full.stop)
            yield {"label": label_B[at], "weight": torch.full((len(full),), float(bool(part))), "index": index_B[at], "view": view_B[at]}


def eval_positions(labels: np.ndarray, rank: int, world: int, batch: int, limit: int | None) -> list[Batch]:
    """As eval_loader without the images."""
    return list(_positions(labels, eval_batches(len(labels), rank, world, batch, limit)))


def _positions(labels: np.ndarray, batches: Iterable[list[SampleRef]]) -> Iterator[Batch]:
    for items in batches:
        index_B = np.array([item.index for item in items])
        yield {
            "label": torch.from_numpy(labels[index_B]),
            "weight": torch.tensor([item.weight for item in items]),
            "index": torch.from_numpy(index_B),
            "view": torch.tensor([item.view for item in items]),
        }


def eval_loader(views: Views, rank: int, world: int, batch: int, limit: int | None, workers: int, pin: bool) -> Loader:
    """View 0 of every sample once over all ranks, in batches of at most `batch`.

    Every rank gets the same number of batches of the same size; what fills the last ones carries weight 0.
    limit: evaluate this many samples, spread evenly over the split, which may be sorted by class; None for all.
    """
    return _loader(views, eval_batches(len(views), rank, world, batch, limit), workers, pin)


def eval_batches(num_samples: int, rank: int, world: int, batch: int, limit: int | None) -> list[list[SampleRef]]:
    num = min(num_samples, limit or num_samples)
    positions = [i * num_samples // num for i in range(num)]
    per_rank = math.ceil(num / world)
    num_batches = math.ceil(per_rank / batch)
    size = math.ceil(per_rank / num_batches)
    items = [SampleRef(p, 0) for p in positions]
    items += [SampleRef(positions[0], 0, weight=0.0)] * (num_batches * size * world - num)
    mine = items[rank::world]
    return [mine[b * size : (b + 1) * size] for b in range(num_batches)]


def _loader(views: Views, batches: StepSampler | Sequence[list[SampleRef]], workers: int, pin: bool) -> Loader:
    return Loader(views, batch_sampler=batches, collate_fn=batches_as_they_are, pin_memory=pin, **worker_options(workers))


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
