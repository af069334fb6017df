"""The last map of a network on a grid: what a stage with target: tokens compares, in place of pooled features.

The maps of student and teacher are brought to the smaller of both grids by adaptive average pooling, the usual way of comparing maps (as in
the code of Tian et al. 2020, arXiv 1910.10699, for attention transfer). So a teacher's map is stored at the size that it is compared at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tltrain.models.chain import Chain
from tltrain.models.factory import Loaded
from tltrain.models.precision import full_precision
from tltrain.models.tracing.maps import as_map
from tltrain.models.tracing.tracer import ghost


@dataclass(frozen=True)
class OnGrid:
    """The step of a block that gives its map on a grid, (net, x) -> (B, side * side, C), where `step` gives the map."""

    step: Callable[[nn.Module, Tensor], Tensor]
    side: int

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        found = as_map(self.step(net, x))
        assert found is not None, "else it was refused before the first step"
        return averaged(found, self.side).flatten(1, 2)


def averaged(map_BhwC: Tensor, side: int) -> Tensor:
    """A map on a grid of at most its own side, (B, side, side, C), in fp32 or higher: `F.adaptive_avg_pool2d`, one side after the other.

    The gradient of torch's own is not deterministic on a GPU.
    """
    out, whole = full_precision(map_BhwC), map_BhwC.shape[1]
    if side == whole:
        return out
    edges = [(i * whole // side, -(-(i + 1) * whole // side)) for i in range(side)]
    for dim in (1, 2):
        out = torch.stack([out.narrow(dim, first, end - first).mean(dim) for first, end in edges], dim)
    return out


def use(chain: Chain, side: int) -> Chain:
    """Make the last block before the head give its map on a grid, in place. Returns the same chain."""
    *before, block, head = chain.blocks
    assert block.last_map is not None
    mapped = replace(block, step=OnGrid(block.last_map.step, side), grid=side)
    chain.blocks = (*before, mapped, replace(head, input_order=None))  # which was that of the pooled vector
    return chain


def teach(chain: Chain, side: int) -> Chain:
    """As `use`, of a teacher, whose head is not asked: it hands on what it is given."""
    use(chain, side)
    chain.blocks = (*chain.blocks[:-1], replace(chain.blocks[-1], step=_as_it_is))
    return chain


def _as_it_is(net: nn.Module, x: Tensor) -> Tensor:
    return x


def shape_of(loaded: Loaded) -> tuple[int, int] | None:
    """(places each way, channels) of a network's last map at the size of its images. None where it has none, or one place alone."""
    chain = loaded.chain
    if chain.runs_whole or len(chain.blocks) < 2 or (last := chain.blocks[-2].last_map) is None:
        return None
    bare, size = ghost(chain), loaded.preprocess.size
    assert isinstance(bare, Chain)
    bare.blocks = (*chain.blocks[:-2], replace(chain.blocks[-2], step=last.step), chain.blocks[-1])
    with torch.no_grad():
        found = as_map(bare.forward(torch.empty((1, 3, size, size), dtype=torch.uint8, device="meta"), stop=len(chain.blocks) - 1))
    return None if found is None or found.shape[1] < 2 else (found.shape[1], found.shape[3])
