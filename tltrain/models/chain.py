"""The Chain type: a network as an ordered list of blocks, the head last.

Freezing, layer-wise learning rates, feature caching, FSDP units and the printed plan all work on this list. So they need no
code for a particular architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tltrain.core.errors import UserError


@dataclass(frozen=True)
class LastMap:
    """How a block that pools gives its map instead."""

    step: Callable[[nn.Module, Tensor], Tensor]
    """(net, x) -> map (B, C, H, W) or (B, H, W, C), or tokens (B, T, C) whose last ones are a square of patches."""
    behind: tuple[str, ...] = ()
    """Paths of the modules and parameters that only the pooled vector passes."""


@dataclass(frozen=True)
class Block:
    """One step through a net, described by the paths of its modules.

    It holds no modules. A closure over modules would run the old weights after ``deepcopy``, and FSDP2 replaces parameters.
    """

    name: str
    """The block's name in recipes and logs, such as layer3.0, block.7 or head."""
    owns: tuple[str, ...]
    """Paths of the block's modules or parameters in the net. Every parameter and buffer belongs to exactly one block."""
    step: Callable[[nn.Module, Tensor], Tensor] | None = None
    """(net, x) -> x. None where the block cannot run alone.

    Freezing, learning rates and sharding work as for other blocks. The net then runs as a whole (`Chain`).
    """
    input_order: tuple[int, ...] | None = None
    """The dimensions of the block's input as they lie in memory when the net runs whole, the slowest first. None for contiguous ones."""
    calls: tuple[str, ...] | None = None
    """Paths of the modules that sharding may wrap: the step calls them whole. None for the first that the block owns."""
    why_whole: str = ""
    """Why the block has no step, in a few words: `the tracer stops at rearrange()`. Empty if it has one, or if that is not known."""
    channels_last: tuple[str, ...] = ()
    """Device types on which the block's convolutions are faster in the channels_last memory format (benchmarks/layouts.py)."""
    distances: Mapping[str, int] | None = None
    """Maps each of its parameters, by the name in the net, to the number of layers between it and the head, for `layer_decay`.

    None: the number of blocks between this one and the head.
    """
    also: tuple[str, ...] = ()
    """Names of the blocks that were merged into it (`merged`)."""
    last_map: LastMap | None = None
    """None where the block keeps no map, or it is not known where."""
    grid: int | None = None
    """Places each way that its map is averaged to, where its step gives that in place of the pooled vector."""

    def distance(self, name: str) -> int | None:
        """Layers between a parameter and the head. A parameter that was added to a module counts as the others of that module do."""
        where = name
        while self.distances is not None and where:
            if found := [n for known, n in self.distances.items() if under(known, (where,))]:
                return min(found)
            where = where.rpartition(".")[0]
        return None


@dataclass(frozen=True)
class InTurn:
    """The step of blocks that were merged: one after the other, each given what the one before it returned."""

    steps: tuple[Callable[[nn.Module, Tensor], Tensor], ...]

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(net, x)
        return x


def merged(blocks: Sequence[Block], wrong_cuts: Collection[int]) -> list[Block]:
    """The blocks, each of those with an index in `wrong_cuts` joined to the one before it. All have steps."""
    out: list[Block] = []
    for index, block in enumerate(blocks):
        if index not in wrong_cuts:
            out.append(block)
            continue
        one = out.pop()
        assert one.step is not None and block.step is not None, "else the net runs whole already"  # noqa: PT018
        calls = tuple(path for each in (one, block) for path in (each.owns[:1] if each.calls is None else each.calls))
        distances = None if one.distances is None or block.distances is None else {**one.distances, **block.distances}
        also, step = (*one.also, block.name, *block.also), InTurn((one.step, block.step))
        last = None if block.last_map is None else replace(block.last_map, step=InTurn((one.step, block.last_map.step)))
        joined = replace(one, owns=(*one.owns, *block.owns), step=step, calls=calls, distances=distances, also=also, last_map=last)
        out.append(joined)
    return out


class Chain(nn.Module):
    """A net that runs block by block, or as a whole where any of its blocks has no step.

    For every k, ``chain(chain(x, stop=k), start=k)`` equals ``net(normalised x)`` bit for bit. Always run blocks through ``forward``:
    a block called outside the wrapped module misses FSDP's hooks. A net that runs as a whole supports neither cached features nor
    activation checkpointing.

    mean, std: per channel, of images in [0, 1]. They are Python constants of the chain, so they stay out of the state dict and
    casts to a lower precision do not round them.
    """

    def __init__(self, net: nn.Module, blocks: Sequence[Block], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.blocks = tuple(blocks)
        self.mean, self.std = tuple(mean), tuple(std)
        self.runs_whole = any(block.step is None for block in blocks)
        self.why_whole = next((block.why_whole for block in blocks if block.why_whole), "")
        self.training_from = 0  # index of the first trainable block
        self.norm_stats = True  # whether BatchNorm in trainable blocks updates its running statistics
        self.recompute = False  # activation checkpointing of the trainable blocks
        self.place_matters = False  # whether features of an image depend on its place in a batch: cache/frozen.py finds out
        self.faster_last = frozenset(device for block in blocks for device in block.channels_last)
        _check_owned_once(net, self.blocks)

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run blocks start to stop (exclusive).

        x: for start 0 images (B, 3, H, W), uint8 or floats in [0, 1]. Otherwise the output of block start - 1.
        Returns the output of the last block that ran. For the head these are logits (B, classes).
        """
        if self.runs_whole:
            return self._whole(x, start, stop)
        if start == len(self.blocks):
            return x
        x = self.normalise(x) if start == 0 else self._laid_out(x, self.blocks[start].input_order)
        for i, block in enumerate(self.blocks[start:stop], start):
            assert block.step is not None, "else the net runs whole"
            if self.recompute and i >= self.training_from and torch.is_grad_enabled():
                again = partial(_statistics_once, [m for _, m in self.modules_of(i)])
                x = checkpoint(block.step, self.net, x, use_reentrant=False, context_fn=again)
            else:
                x = block.step(self.net, x)
        return x

    def _laid_out(self, x: Tensor, order: tuple[int, ...] | None) -> Tensor:
        """One layout for cached and computed features: the same kernels, so equal bits."""
        if order is not None and not self.channels_last:
            return x.permute(order).contiguous().permute([order.index(d) for d in range(x.ndim)])
        return x.contiguous(memory_format=self.layout) if x.ndim == 4 else x

    def _whole(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Run the net as a whole: images (B, 3, H, W) to logits (B, classes). Raises ValueError for a part of the net."""
        if start != 0 or stop not in (None, len(self.blocks)) or self.recompute:
            how = "recomputed block by block" if self.recompute else f"run from block {start} to {stop}"
            raise ValueError(f"a net with a block that has no step runs whole, and cannot be {how}")
        out = self.net(self.normalise(x))
        return out if isinstance(out, Tensor) else out.logits

    @property
    def channels_last(self) -> bool:
        """Whether images and convolution weights use the channels_last memory format. Depends on the family and the device."""
        return next(self.net.parameters()).device.type in self.faster_last

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def normalise(self, x: Tensor) -> Tensor:
        """Normalise images (B, 3, H, W), uint8 or floats in [0, 1], by mean and std.

        Computes in fp32 or higher. Returns the net's dtype and memory format.
        """
        x = x.float() / 255 if x.dtype == torch.uint8 else x.to(torch.promote_types(x.dtype, torch.float32))
        mean = torch.tensor(self.mean, dtype=x.dtype).to(x.device, non_blocking=True).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=x.dtype).to(x.device, non_blocking=True).view(1, -1, 1, 1)
        return ((x - mean) / std).to(next(self.net.parameters()).dtype).contiguous(memory_format=self.layout)

    def freeze(self, first: int, norm_stats: bool) -> Self:
        """Freeze the blocks before `first` and make the rest trainable. Frozen blocks have no gradients and stay in eval mode.

        norm_stats: whether BatchNorm in the trainable blocks updates its running statistics.
        """
        self.training_from, self.norm_stats = first, norm_stats
        for i in range(len(self.blocks)):
            for _, parameter in self.parameters_of(i):
                parameter.requires_grad_(i >= first)
                parameter.grad = None  # under AdamW a zero gradient still moves a parameter, and None does not
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train, but frozen blocks stay in eval mode. With requires_grad=False alone, running statistics would drift."""
        super().train(mode)
        for i in range(len(self.blocks)):
            for _, module in self.modules_of(i):
                if i < self.training_from or (not self.norm_stats and is_batch_norm(module)):
                    module.train(False)
        return self

    def parameters_of(self, index: int) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name in the net, parameter) for each parameter of a block."""
        owns = self.blocks[index].owns
        return ((name, p) for name, p in self.net.named_parameters() if under(name, owns))

    def modules_of(self, index: int) -> Iterator[tuple[str, nn.Module]]:
        """Yields (name in the net, module) for each module of a block."""
        owns = self.blocks[index].owns
        return ((name, m) for name, m in self.net.named_modules() if name and under(name, owns))

    def index(self, where: str) -> int:
        """Index of the first block named `where`: a block, a group of blocks (layer4 for layer4.0), or all. Raises UserError."""
        if where == "all":
            return 0
        for i, block in enumerate(self.blocks):
            if any(name == where or name.startswith(where + ".") for name in (block.name, *block.also)):
                return i
        names = ", ".join(b.name for b in self.blocks)
        raise UserError(f"unfreeze is {where!r}, which no block of this network is called; its blocks: all, {names}")


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _statistics_once(
    modules: Sequence[nn.Module],
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """The context managers that checkpoint needs: for a block's forward pass, and for its recomputation in backward."""
    return contextlib.nullcontext(), _spared_statistics(modules)


@contextlib.contextmanager
def _spared_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    """During recomputation, BatchNorm updates copies of its running statistics, so that each batch counts once.

    It still normalises by the statistics of the batch. The copies are needed: with no running statistics at all, autograd would save
    fewer tensors than in the first forward pass, and checkpoint raises an error for that.
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


_PLAIN = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Classes of which a network has many that are no block. FSDP wraps all modules of a class."""


def unit_classes(chain: Chain) -> list[str]:
    """Class names of the modules that FSDP wraps as units: those that make up a whole block."""
    names, modules = [], dict(chain.net.named_modules())
    for block in chain.blocks:
        for path in block.owns[:1] if block.calls is None else block.calls:
            module = modules.get(path)
            if module is not None and any(True for _ in module.children()) and type(module) not in _PLAIN:
                names.append(type(module).__name__)
    return list(dict.fromkeys(names))


def under(name: str, owns: tuple[str, ...]) -> bool:
    """Whether one of these paths is that of a module or tensor, or of a module around it."""
    return any(name == path or name.startswith(path + ".") for path in owns)


def _check_owned_once(net: nn.Module, blocks: tuple[Block, ...]) -> None:
    """Check that each parameter and buffer belongs to exactly one block, under all of its names. Raises ValueError."""
    owner: dict[int, str] = {}
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        owners = [b.name for b in blocks if under(name, b.owns)]
        if len(owners) != 1:
            raise ValueError(f"{name} must belong to one block, and belongs to {owners or 'none'}")
        if owner.setdefault(id(tensor), owners[0]) != owners[0]:
            other = owner[id(tensor)]
            raise ValueError(f"{name} of block {owners[0]} is the same tensor as one of block {other}; blocks cannot share a weight")


def on_device(chain: Chain, device: torch.device) -> Chain:
    """Move the chain to a device, and its weights to the memory format that is faster there. Returns the same chain."""
    chain.to(device)
    for each in chain.modules():  # an ensemble has chains as its members
        if isinstance(each, Chain) and each.channels_last:
            each.to(memory_format=torch.channels_last)
    return chain
