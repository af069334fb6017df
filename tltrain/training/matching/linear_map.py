"""A linear map in place of the head: from the student's features to as many numbers as a teacher's have.

It trains with the stage that learns the features, and stands in that stage's checkpoints. What the stage hands on has the head again that
the run began with, which has not been used yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tltrain.core.stage_plan import StagePlan, TaughtFeatures
from tltrain.data.sampler import derive_seed
from tltrain.models.chain import Chain
from tltrain.training.matching import grid
from tltrain.training.weights.solved import linear_head

PARAMETERS = ("map_weight", "map_bias")
"""Last parts of the names of the map's tensors."""


class LinearMap(nn.Module):
    """Maps features (B, D), or each place of a map (B, places, D), to as many numbers as a teacher's have (Romero et al. 2015, arXiv
    1412.6550)."""

    def __init__(self, head: nn.Linear, features: TaughtFeatures, generator: torch.Generator) -> None:
        """head: the layer whose place it takes."""
        super().__init__()
        weight_WD = torch.empty(features.num_out, features.num_in)
        nn.init.kaiming_uniform_(weight_WD, a=math.sqrt(5), generator=generator)  # as nn.Linear begins
        self.map_weight = nn.Parameter(weight_WD.to(head.weight.device, head.weight.dtype))
        self.map_bias = nn.Parameter(head.weight.new_zeros(features.num_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.map_weight, self.map_bias)


def attach(chain: Chain, stage: StagePlan, seed: int) -> Chain:
    """Put a stage's map in the place of the head, in place, if the stage learns features. Returns the same chain. seed: the recipe's."""
    if stage.features is not None:
        path, head = linear_head(chain, "the student", "")
        if stage.features.side is not None:
            grid.use(chain, stage.features.side)
        generator = torch.Generator().manual_seed(derive_seed(seed, "map", stage.index))
        parent, _, name = path.rpartition(".")
        setattr(chain.net.get_submodule(parent), name, LinearMap(head, stage.features, generator))
    return chain


def maps(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the map alone. Empty where there is none."""
    return {name: t for name, t in state.items() if _is_map(name)}


def plain(state: Mapping[str, Tensor], begun: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the network's own names, without a map. begun: that of the run's beginning, whose head stands in its place."""
    if not maps(state):
        return dict(state)
    return {name: state.get(name, begun[name]) for name in begun}


def _is_map(name: str) -> bool:
    return name.rpartition(".")[2] in PARAMETERS
