"""Blocks of a network that is traced with torch.fx: cut where exactly one tensor lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from tltrain.models.chain import Block


class CannotCut(Exception):
    """A network that cannot be cut. Its text says why, in a few words that follow a colon: `the tracer stops at rearrange()`."""


def traced_blocks(
    net: nn.Module,
    head: str,
    dropout: float,
    size: int,
    *,
    leaf_functions: Sequence[Callable[..., Any]] = (),
    leaf_modules: Sequence[type[nn.Module]] = (),
    forward_defaults: Mapping[str, Any] | None = None,
    channels_last: tuple[str, ...] = (),
) -> list[Block]:
    """The blocks of any network that torch.fx can trace, the head last. All have steps, so the network can be cut between any two.

    Blocks are the elements of the innermost repeated containers (`layer1.0`, `blocks.3`), or the smallest containers around them that
    can be cut. What comes before the first is `stem`; the final norm and the pooling belong to the last before `head`.

    net: maps normalised images (B, 3, size, size) to logits (B, classes), on any device, meta included. Its weights are not read.
    head: path of the linear classifier, which must take the pooled features (B, D) alone and give the logits.
    dropout: probability for the input of the head.
    leaf_functions, leaf_modules: functions (as the network's modules call them by name) and classes of modules that are not traced into.
    forward_defaults: values of the optional arguments of the net's forward. Those left out keep their own defaults.
    channels_last: as in `Block`.
    Raises CannotCut; `grouped_blocks` then gives blocks that run whole:

        try:
            return traced_blocks(net, head, dropout, size)
        except CannotCut as why:
            return grouped_blocks(net, head, str(why))
    """
    raise CannotCut("tracing comes with the next commit")
