"""Block steps that all families share.

They are functions of module paths, bound with ``functools.partial``. They hold no modules, so a copied chain runs its own weights.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from tltrain.models.chain import Block


def run_module(path: str, net: nn.Module, x: Tensor) -> Tensor:
    return net.get_submodule(path)(x)


def head_block(path: str, dropout: float) -> Block:
    """The last block: dropout on the pooled features (B, D), then the classifier. Dropout is active in the head's training mode."""
    step = partial(_dropout_head, path, dropout) if dropout > 0 else partial(run_module, path)
    return Block("head", (path,), step)


def _dropout_head(path: str, dropout: float, net: nn.Module, x_BD: Tensor) -> Tensor:
    head = net.get_submodule(path)
    return head(F.dropout(x_BD, dropout, head.training))
