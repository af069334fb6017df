"""Maps: what the output of a block has at each place of an image, and where a traced network still has one before it pools."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tltrain.models.chain import LastMap
from tltrain.models.tracing.cuts import Cuts

MOST_OTHER_TOKENS = 8
"""Tokens of a transformer that stand before those of the patches: class token, registers."""


def space(maps: Tensor) -> tuple[int, int]:
    """The two dimensions of space of maps (B, C, H, W) or (B, H, W, C): images are square, and so the two equal sides are space. Where all
    are equal, channels come first."""
    return (1, 2) if maps.shape[1] == maps.shape[2] != maps.shape[3] else (2, 3)


def as_map(features: Tensor) -> Tensor | None:
    """Features as (B, h, w, C); None if they are no map. Takes (B, C, h, w), (B, h, w, C), and (B, tokens, C) of a square of patches."""
    if features.ndim == 4:
        return features if space(features) == (1, 2) else features.permute(0, 2, 3, 1)
    if features.ndim != 3:
        return None
    side = math.isqrt(features.shape[1])
    others = features.shape[1] - side**2
    if others > MOST_OTHER_TOKENS:
        return None
    return features[:, others:].unflatten(1, (side, side))


def last_map(cuts: Cuts, start: int, stop: int) -> LastMap | None:
    """The last map between two places to cut, of which the second has the pooled vector. None where there is none."""
    pooled = cuts.values[cuts.living(stop) or 0][0]
    for place in range(stop, start, -1):
        if cuts.living(place) == place and _is_map(cuts.values[place], pooled.shape[-1]):
            return LastMap(cuts.segment(start, place), _behind(cuts, place, stop))
    return None


def _behind(cuts: Cuts, place: int, stop: int) -> tuple[str, ...]:
    """Paths of the modules and tensors that are read up to a place to cut, and not for the value that was made there."""
    needed = {place}
    for each in reversed(cuts.instructions[:place]):
        needed |= each.reads() if each.number in needed else set()
    read = [(str(each.target), each.number in needed) for each in cuts.instructions[:stop] if each.op in ("module", "attribute")]
    return tuple(sorted({path for path, _ in read} - {path for path, is_needed in read if is_needed}))


def _is_map(values: Sequence[Tensor], width: int) -> bool:
    """Whether a value, of two and of three images, has more than one place. width: numbers of the vector that it is pooled to.

    Tokens (B, T, C) are told from their transpose, which a transformer may pool too, by the width: it is that of their channels.
    """
    two, three = values
    if (len(two), len(three)) != (2, 3) or (found := as_map(two)) is None or not found.shape[1] == found.shape[2] > 1:
        return False
    tokens, channels = two.shape[1], two.shape[-1]
    return two.ndim == 4 or (tokens != channels and tokens != width and width % channels == 0)
