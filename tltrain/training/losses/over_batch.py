"""Losses that compare images with each other, over the micro-batches of all processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tltrain.distributed.runtime import Runtime
from tltrain.models.precision import full_precision


@dataclass(frozen=True)
class Together:
    """The rows of all processes' micro-batches, as if one process had them."""

    gather: Callable[[Tensor], Tensor]
    """Concatenates a tensor of one shape over processes. Collective."""
    rank: int
    num_rows: int
    """Images of the largest micro-batch of a process. Smaller ones are padded, so that all have one shape."""

    @classmethod
    def of(cls, runtime: Runtime, batch: int, num_micro: int) -> Together:
        """batch: of a step, over all processes. num_micro: micro-batches of a process in it."""
        return cls(runtime.gather, runtime.rank, math.ceil(math.ceil(batch / runtime.world) / num_micro))

    def __call__(self, loss: Callable[..., Tensor], student_BK: Tensor, teacher_BK: Tensor, temperature: float, weight_B: Tensor) -> Tensor:
        """The mean of a loss that reads the batch, as the value of each sample (B,) of this process. Collective.

        Weighed and summed over processes, its gradient is that of the mean over all samples: each process computes the part through its
        own logits, for which it stands for the samples of the others too.
        """
        student_NK, teacher_NK, weight_N = (self._all(full_precision(x)) for x in (student_BK, teacher_BK, weight_B))
        total = weight_N.sum()
        mean = (loss(student_NK, teacher_NK, temperature, weight_N) * weight_N).sum() / total
        stands_for = total / weight_B.sum().clamp_min(1)
        return (mean.detach() + (mean - mean.detach()) * stands_for).expand(len(weight_B))

    def _all(self, own: Tensor) -> Tensor:
        """The rows of all processes, with a gradient through those of this one."""
        own = torch.cat([own, own.new_zeros((self.num_rows - len(own), *own.shape[1:]))])
        parts = list(self.gather(own.detach()).split(self.num_rows))
        return torch.cat([*parts[: self.rank], own, *parts[self.rank + 1 :]])
