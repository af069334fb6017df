"""One vector an image, from what any block of a network gives."""

from __future__ import annotations

import math

from torch import Tensor

from tltrain.models.chain import Chain
from tltrain.models.tracing.maps import space

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "cls_embedding")
"""What networks call the parameter that becomes the class token, the first of the tokens."""


def pooled(chain: Chain, x: Tensor) -> Tensor:
    """(B, ...), the output of a block -> (B, D) float32: maps are averaged over space, tokens give their class token or their mean.

    Maps: (B, C, H, W) or (B, H, W, C), as `space` tells them apart. Tokens: (B, T, D). Vectors stay as they are.
    """
    x = x.float()
    if x.ndim == 2:
        return x
    if x.ndim == 3:
        return x[:, 0] if has_class_token(chain, x.shape[1]) else x.mean(1)
    if x.ndim == 4:
        return x.mean(space(x))
    return x.flatten(1, -2).mean(1)


def has_class_token(chain: Chain, num_tokens: int) -> bool:
    """Whether the first of these tokens is a class token that the network answers by.

    Images are square, and so is the grid of their patches. A square number of tokens is the grid alone: some networks add the class
    token late. One that averages its patches (timm's global_pool is avg) does not use its class token.
    """
    if math.isqrt(num_tokens) ** 2 == num_tokens or getattr(chain.net, "global_pool", None) == "avg":
        return False
    return any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in chain.net.named_parameters())
