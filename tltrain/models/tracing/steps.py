"""Block steps that all families share.

They are functions of module paths, bound with ``functools.partial``. They hold no modules, so a copied chain runs its own weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from tltrain.models.chain import Block

Step = Callable[[nn.Module, Tensor], Tensor]


def run_module(path: str, net: nn.Module, x: Tensor) -> Tensor:
    return net.get_submodule(path)(x)


def head_block(path: str, dropout: float) -> Block:
    """The last block: dropout on the pooled features (B, D), then the classifier. Dropout is active in the head's training mode."""
    return Block("head", (path,), with_dropout(path, dropout, partial(run_module, path)))


def with_dropout(path: str, dropout: float, step: Step) -> Step:
    """A step whose input passes dropout first, while the module at a path is in training mode."""
    return partial(_dropped, path, dropout, step) if dropout > 0 else step


def _dropped(path: str, dropout: float, step: Step, net: nn.Module, x: Tensor) -> Tensor:
    return step(net, F.dropout(x, dropout, net.get_submodule(path).training))
