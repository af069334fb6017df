"""An exponential moving average of the weights that a stage trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tltrain.distributed.strategies import Strategy


class Ema:
    """The average of a stage, which begins with its first weights. Held in the strategy's own layout: a shard where it shards.

    BatchNorm statistics that train are averaged like parameters, as timm's ModelEmaV3 does. With a stage's low-rank updates, A and B are
    averaged.
    """

    def __init__(self, strategy: Strategy, limit: float, saved: Mapping[str, Tensor] | None) -> None:
        """limit: the largest decay. saved: the average of a checkpoint, whole, on every process; None begins a new one. Collective."""
        self.strategy, self.limit = strategy, limit
        self.averages = [value.clone() for value in strategy.trained_values()]
        if saved is not None:
            with self.applied():
                strategy.put(saved)

    def update(self, step: int) -> None:
        """Take up the weights after optimizer step `step` (from 0) of the stage. The decay begins at 0.1 and rises to its limit."""
        decay = min(self.limit, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.strategy.trained_values(), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """In the context, the network has the averaged weights. They are exchanged with its own, so that both stay exact. Collective."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state(self) -> dict[str, Tensor]:
        """The averaged weights for a checkpoint, as `Strategy.weights` gives them. Collective. Complete on process 0."""
        with self.applied():
            return self.strategy.trained(self.strategy.weights())

    def _exchange(self) -> None:
        for value, average in zip(self.strategy.trained_values(), self.averages, strict=True):
            own = value.clone()
            value.copy_(average)
            average.copy_(own)
        self.strategy.refresh()
