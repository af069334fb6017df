"""LoRA (Hu et al. 2021, arXiv 2106.09685): a layer's weight W stays frozen, and a low-rank update of it trains.

The layer runs with W + alpha / rank * B @ A. A begins random and B zero, so that a stage begins with the network that it was given.
torch's parametrisation puts the update behind the layer's own `weight`: networks that read it without calling the layer, as attention
does, are served too. Merged, the update is added to W, and the tensors have the network's own names again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tltrain.core.recipe import Stage
from tltrain.models.chain import Chain, under

PARAMETERS = ("lora_A", "lora_B")
"""Last parts of the names of an update's matrices."""
_MARK, _ORIGINAL, _A, _B = "parametrizations.", "original", "0.lora_A", "0.lora_B"


class LowRankUpdate(nn.Module):
    """Adds scale * B @ A to a weight (out, in) or (out, in, 1, 1)."""

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        a_RI = torch.empty(rank, weight.shape[1])
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)  # as nn.Linear begins
        self.lora_A = nn.Parameter(a_RI.to(weight.device, weight.dtype))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the sum is rounded once, by the layer, as a merged weight is
            return _updated(weight, self.lora_A, self.lora_B, self.scale)


def _updated(weight: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    return weight + scale * (b_OR @ a_RI).view(weight.shape)


def layers(chain: Chain, index: int, without: tuple[str, ...] = ()) -> Iterator[tuple[nn.Module, str]]:
    """Yields (module, name of its weight) for each layer of a block that LoRA updates.

    These are linear layers, 1x1 convolutions, and the joint projection of queries, keys and values of torch's attention.
    without: paths of modules that keep their weights.
    """
    for path, module in chain.modules_of(index):
        if under(path, without):
            continue
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        if isinstance(module, nn.Linear) or pointwise:
            yield module, "weight"
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield module, "in_proj_weight"


def num_parameters(chain: Chain, index: int, rank: int, without: tuple[str, ...] = ()) -> int:
    """Number of parameters that LoRA trains in a block. without: as in `layers`."""
    shapes = [getattr(module, name).shape for module, name in layers(chain, index, without)]
    return sum(rank * (shape[0] + shape[1]) for shape in shapes)


def attach(chain: Chain, first: int, spec: Stage, seed: int, without: tuple[str, ...] = ()) -> Chain:
    """Give the layers of the blocks from `first` up to the head their updates, in place. Returns the same chain.

    seed: of the random A, drawn layer by layer. without: as in `layers`.
    """
    generator = torch.Generator().manual_seed(seed)
    for i in range(first, len(chain.blocks) - 1):
        for module, name in list(layers(chain, i, without)):
            weight = getattr(module, name)
            update = LowRankUpdate(weight, spec.lora_rank, _scale(spec), generator)
            parametrize.register_parametrization(module, name, update, unsafe=True)
    return chain


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the network's own names, without the updates."""
    return {own_name(name): t for name, t in state.items() if not _is_update(name)}


def updates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The updates alone. Empty where there are none."""
    return {name: t for name, t in state.items() if _is_update(name)}


def merged(state: Mapping[str, Tensor], spec: Stage) -> dict[str, Tensor]:
    """A state dict under the network's own names, with each update added to its weight.

    Where the updates are empty, as on processes other than 0, weights stay as they are.
    """
    out = plain(state)
    for name, weight in state.items():
        prefix = name.removesuffix(_ORIGINAL)
        if _MARK in name and prefix != name and (b_OR := state[prefix + _B]).numel():
            out[own_name(name)] = _updated(weight, state[prefix + _A], b_OR, _scale(spec))
    return out


def without_update(state: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain weights `start` under the names of `state`, with updates that add nothing: its A, and B zero."""
    return {
        name: torch.zeros_like(t) if name.endswith(_B) else t if _is_update(name) else start[own_name(name)] for name, t in state.items()
    }


def _scale(spec: Stage) -> float:
    return spec.lora_alpha / spec.lora_rank


def _is_update(name: str) -> bool:
    return _MARK in name and name.endswith((_A, _B))


def own_name(name: str) -> str:
    """The network's own name of a frozen weight or of its update: x.parametrizations.weight.0.lora_A -> x.weight."""
    if _MARK not in name:
        return name
    own = name.replace(_MARK, "")
    for part in (_ORIGINAL, _A, _B):
        own = own.removesuffix(f".{part}")
    return own
