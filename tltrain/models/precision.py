"""Promotion of half-precision tensors for softmax and losses."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """Cast bf16 and fp16 to fp32. A softmax over half-precision logits would lose the small probabilities that distillation needs."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
