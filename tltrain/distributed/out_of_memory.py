"""Errors of a device that has no room: told from others, cleaned up after, and tried again with less."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from tltrain.core.errors import UserError

T = TypeVar("T")
SAID = (
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)
"""The same in the words of CUDA itself, of Apple's GPUs, of cuBLAS and cuDNN, and of torch where cuDNN finds room for none of its ways."""


class ChunkTooLarge(torch.OutOfMemoryError):
    """There is no room for a chunk of images in a network that is frozen."""

    def __init__(self, error: BaseException, chunk: int) -> None:
        super().__init__(str(error))
        self.chunk = chunk


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no room."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in SAID))


def release() -> None:
    """Give back what nobody holds any more, and count peaks anew. The error must be gone: its frames hold the tensors."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def fitting(compute: Callable[[int], T], size: int) -> tuple[T, int]:
    """(compute(size), size), or with half as many images at a time, and half of those, until the device has room.

    Raises UserError where one image is too many.
    """
    while True:
        try:
            return compute(size), size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                rule = "free its memory, or choose another (CUDA_VISIBLE_DEVICES; empty for the CPU)"
                raise UserError(f"the device has no room for this network and one image: {first_line(error)}; {rule}") from error
        release()
        size //= 2


def first_line(error: BaseException) -> str:
    """What an error says, without the advice that torch gives behind it."""
    lines = str(error).splitlines() or [type(error).__name__]
    return ". ".join(lines[0].split(". ")[:3])
