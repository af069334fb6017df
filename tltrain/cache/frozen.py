"""Frozen networks, whose answers are computed once: the prefix of a stage and the teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tltrain.data.views import Batch
from tltrain.distributed.out_of_memory import ChunkTooLarge, is_out_of_memory
from tltrain.models.chain import Chain

FEATURES, TEACHER = "features", "teacher"
"""What a batch holds beside, or in place of, its images: what a frozen prefix, or a teacher, says of them."""


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


WHOLE = InputAdapter()
"""The network runs from its images on: nothing before it is frozen or stored."""


Autocast = Callable[[], AbstractContextManager[None]]
