"""timm's layers of a network, by its `group_matcher`: for layer-wise learning rates, and as blocks of a network that cannot be cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from tltrain.models.chain import Block
from tltrain.models.timm import networks

_HALF = 0.5
"""A layer decay whose powers are exact, so that timm's scales can be read back as numbers of layers."""


def distances(net: nn.Module) -> dict[str, int]:
    """Maps each parameter's name to the layers between it and the head, as timm counts them for its layer decay."""
    networks.library()
    from timm.optim import param_groups_layer_decay

    names = {id(parameter): name for name, parameter in net.named_parameters()}
    frozen = [parameter for parameter in net.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)  # timm leaves the others out
    groups = param_groups_layer_decay(net, layer_decay=_HALF)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return {names[id(p)]: round(math.log(group["lr_scale"], _HALF)) for group in groups for p in group["params"]}


def with_distances(net: nn.Module, blocks: Sequence[Block]) -> list[Block]:
    """The same blocks, each with timm's distances of its parameters."""
    found = distances(net)
    return [replace(block, distances={name: n for name, n in found.items() if _under(name, block.owns)}) for block in blocks]


def groups(net: nn.Module, heads: Sequence[str]) -> dict[str, list[str]]:
    """Maps the name of each layer to the paths of its modules and tensors, the first layer first, the classifiers left out.

    A module whose parameters are all of one layer stands for them. Buffers go with the parameters of their module, or else with those
    that stand before them.
    """
    layer = {name: -n for name, n in distances(net).items() if not _under(name, tuple(heads))}
    found: dict[int, list[str]] = {}
    last = min(layer.values())

    def visit(path: str, module: nn.Module) -> None:
        nonlocal last
        if path in heads:
            return
        whole = not any(head.startswith(path + ".") for head in heads)
        inside = {layer[name] for name in layer if _under(name, (path,))} if path else set(layer.values())
        if path and whole and len(inside) <= 1:
            last = inside.pop() if inside else last
            if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
                found.setdefault(last, []).append(path)
            return
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = f"{path}.{name}" if path else name
            last = layer.get(full, last)
            found.setdefault(last, []).append(full)
        for name, child in module.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", net)
    return {_name(paths, i): paths for i, (_, paths) in enumerate(sorted(found.items()))}


def _name(paths: Sequence[str], index: int) -> str:
    """The path that all paths of a layer begin with, or the first one of them."""
    shared = [parts[0] for parts in zip(*(path.split(".") for path in paths), strict=False) if len(set(parts)) == 1]
    return (".".join(shared) or paths[0]) if index else "stem"


def _under(name: str, owns: tuple[str, ...]) -> bool:
    return any(name == path or name.startswith(path + ".") for path in owns)
