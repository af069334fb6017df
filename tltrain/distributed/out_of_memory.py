"""Out-of-memory errors: recognise them, free memory, and retry with smaller batches."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from tltrain.core.errors import UserError, first_line

T = TypeVar("T")
MESSAGES = (
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)
"""Messages of out-of-memory errors that torch raises as a plain RuntimeError: from CUDA, MPS, cuBLAS and cuDNN. torch raises the last one
where no cuDNN engine has enough workspace."""


class ChunkTooLarge(torch.OutOfMemoryError):
    """The device has no room for one chunk of images in the forward pass of a frozen network."""

    def __init__(self, error: BaseException, chunk: int) -> None:
        super().__init__(str(error))
        self.chunk = chunk


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(m in str(error) for m in MESSAGES))


def release() -> None:
    """Free unreferenced memory and reset the peak statistics. Drop the exception first: its traceback keeps the tensors alive."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def fitting(compute: Callable[[int], T], size: int) -> tuple[T, int]:
    """(compute(size), size). On an out-of-memory error it halves `size`, the number of images at a time, and tries again.

    Raises UserError if even one image does not fit.
    """
    while True:
        try:
            return compute(size), size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                rule = "free its memory, or choose another (CUDA_VISIBLE_DEVICES; empty for the CPU)"
                raise UserError(f"the device has no room for this network and one image: {without_advice(error)}; {rule}") from error
        release()
        size //= 2


def without_advice(error: BaseException) -> str:
    """The first line of an error's message, without torch's advice at its end."""
    return ". ".join(first_line(error).split(". ")[:3])
