"""The precision that sums are taken in."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """bf16 and fp16 in fp32: a softmax over half-precision logits loses the small probabilities that distillation is about."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
