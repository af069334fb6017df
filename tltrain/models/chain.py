"""A network is an ordered list of blocks, the head last.

Freezing, layer-wise learning rates, what can be stored, FSDP units and the printed plan are all answers read from
this list; no other module knows a ResNet from a ViT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tltrain.core.errors import UserError


@dataclass(frozen=True)
class Block:
    """A description of one step through a net, not a holder of modules: a closure over modules runs the wrong
    weights after ``deepcopy``, and captured parameters go stale under FSDP2."""

    name: str
    """Ours, what a recipe and a log line say: layer3.0, block.7, head."""
    owns: tuple[str, ...]
    """Module or parameter paths of the net; every parameter and buffer belongs to exactly one block."""
    step: Callable[[nn.Module, Tensor], Tensor] | None = None
    """(net, x) -> x. None: it cannot run alone. It is frozen, grouped, given a learning rate and sharded as others are, but not cut at."""
    channels_last: tuple[str, ...] = ()
    """Types of devices whose convolutions in it are faster where images (B, C, H, W) lie with channels last (benchmarks/layouts.py)."""


class Chain(nn.Module):
    """A net run block by block, or whole where any of its blocks has no step.

    Only ``forward`` runs blocks: a block called outside the wrapped module misses FSDP's hooks. For every k,
    ``chain(chain(x, stop=k), start=k)`` equals ``net(normalised x)`` bit for bit. A net that runs whole is never cut: nothing in front
    of a block is stored, and nothing is recomputed block by block.

    mean, std: per channel, of images in [0, 1]. They are constants of the chain, not tensors of the net: they stay out of
    the state dict, and no strategy's cast rounds them.
    """

    def __init__(self, net: nn.Module, blocks: Sequence[Block], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.blocks = tuple(blocks)
        self.mean, self.std = tuple(mean), tuple(std)
        self.runs_whole = any(block.step is None for block in blocks)
        self.training_from = 0  # the first block that trains
        self.norm_stats = True  # whether BatchNorm of training blocks updates its statistics
        self.recompute = False  # whether the activations of training blocks are computed again in backward
        self.faster_last = frozenset(device for block in blocks for device in block.channels_last)
        _check_owned_once(net, self.blocks)

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run blocks start to stop (exclusive).

        x: for start 0 images (B, 3, H, W), uint8 or floats in [0, 1]; else what block start - 1 returned.
        Returns what the last block run returns: logits (B, classes) when that is the head.
        """
        if self.runs_whole:
            return self._whole(x, start, stop)
        if start == 0:
            x = self.normalise(x)
        elif x.ndim == 4:  # wherever it comes from, it has one layout, and so the same kernels and the same bits
            x = x.contiguous(memory_format=self.layout)
        for i, block in enumerate(self.blocks[start:stop], start):
            assert block.step is not None, "else the net runs whole"
            if self.recompute and i >= self.training_from and torch.is_grad_enabled():
                again = partial(_statistics_once, [m for _, m in self.modules_of(i)])
                x = checkpoint(block.step, self.net, x, use_reentrant=False, context_fn=again)
            else:
                x = block.step(self.net, x)
        return x

    def _whole(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Images (B, 3, H, W) to logits (B, classes)."""
        if start != 0 or stop not in (None, len(self.blocks)) or self.recompute:
            how = "recomputed block by block" if self.recompute else f"run from block {start} to {stop}"
            raise ValueError(f"a net with a block that has no step runs whole, and cannot be {how}")
        out = self.net(self.normalise(x))
        return out if isinstance(out, Tensor) else out.logits

    @property
    def channels_last(self) -> bool:
        """Whether images and the weights of convolutions lie with channels last: a matter of the family and of the device."""
        return next(self.net.parameters()).device.type in self.faster_last

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def normalise(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 or floats in [0, 1], to the net's input; in at least fp32, then in the net's dtype and layout."""
        x = x.float() / 255 if x.dtype == torch.uint8 else x.to(torch.promote_types(x.dtype, torch.float32))
        mean = torch.tensor(self.mean, dtype=x.dtype).to(x.device, non_blocking=True).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=x.dtype).to(x.device, non_blocking=True).view(1, -1, 1, 1)
        return ((x - mean) / std).to(next(self.net.parameters()).dtype).contiguous(memory_format=self.layout)

    def freeze(self, first: int, norm_stats: bool) -> Self:
        """Blocks before `first` are frozen, the rest train. Frozen means no gradients and eval mode.

        norm_stats: whether BatchNorm of the training blocks updates its running statistics.
        """
        self.training_from, self.norm_stats = first, norm_stats
        for i in range(len(self.blocks)):
            for _, parameter in self.parameters_of(i):
                parameter.requires_grad_(i >= first)
                parameter.grad = None  # a zero gradient, unlike none, still moves a parameter under AdamW
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train, but frozen blocks stay in eval mode: requires_grad=False alone lets running statistics drift."""
        super().train(mode)
        for i in range(len(self.blocks)):
            for _, module in self.modules_of(i):
                if i < self.training_from or (not self.norm_stats and is_batch_norm(module)):
                    module.train(False)
        return self

    def parameters_of(self, index: int) -> Iterator[tuple[str, nn.Parameter]]:
        """(the net's own name, parameter) for each parameter of a block."""
        owns = self.blocks[index].owns
        return ((name, p) for name, p in self.net.named_parameters() if _under(name, owns))

    def modules_of(self, index: int) -> Iterator[tuple[str, nn.Module]]:
        """(the net's own name, module) for each module inside a block."""
        owns = self.blocks[index].owns
        return ((name, m) for name, m in self.net.named_modules() if name and _under(name, owns))

    def index(self, where: str) -> int:
        """The first block that `where` means: a block's name, a group's (layer4 for layer4.0), or all. Raises UserError."""
        if where == "all":
            return 0
        for i, block in enumerate(self.blocks):
            if block.name == where or block.name.startswith(where + "."):
                return i
        names = ", ".join(b.name for b in self.blocks)
        raise UserError(f"unfreeze is {where!r}, which no block of this network is called; its blocks: all, {names}")


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _statistics_once(
    modules: Sequence[nn.Module],
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Contexts of a block's forward and of its repetition in backward."""
    return contextlib.nullcontext(), _spared_statistics(modules)


@contextlib.contextmanager
def _spared_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    """BatchNorm normalises by the statistics of the batch as it did the first time, and moves copies of its running ones.

    Without any (track_running_stats False) autograd would save fewer tensors than the first time, which checkpoint refuses.
    """
    buffers = [m._buffers for m in modules if is_batch_norm(m) and m.training]
    own = [dict(each) for each in buffers]
    try:
        for each in buffers:
            each.update({name: None if tensor is None else tensor.clone() for name, tensor in each.items()})
        yield
    finally:
        for each, tensors in zip(buffers, own, strict=True):
            each.update(tensors)


def unit_classes(chain: Chain) -> list[str]:
    """Class names of the modules that are a whole block: FSDP's units."""
    names = []
    for block in chain.blocks:
        module = chain.net.get_submodule(block.owns[0]) if block.owns[0] in dict(chain.net.named_modules()) else None
        if module is not None and any(True for _ in module.children()):
            names.append(type(module).__name__)
    return list(dict.fromkeys(names))


def _under(name: str, owns: tuple[str, ...]) -> bool:
    return any(name == path or name.startswith(path + ".") for path in owns)


def _check_owned_once(net: nn.Module, blocks: tuple[Block, ...]) -> None:
    """Every parameter and buffer of the net by exactly one block; a tensor under two names shows up by both. Raises ValueError."""
    owner: dict[int, str] = {}
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        owners = [b.name for b in blocks if _under(name, b.owns)]
        if len(owners) != 1:
            raise ValueError(f"{name} must belong to one block, and belongs to {owners or 'none'}")
        if owner.setdefault(id(tensor), owners[0]) != owners[0]:
            other = owner[id(tensor)]
            raise ValueError(f"{name} of block {owners[0]} is the same tensor as one of block {other}; blocks cannot share a weight")


def on_device(chain: Chain, device: torch.device) -> Chain:
    """The chain there, its weights laid out as they run fastest."""
    chain.to(device)
    return chain.to(memory_format=torch.channels_last) if chain.channels_last else chain
