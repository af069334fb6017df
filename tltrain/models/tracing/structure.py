"""The containers of a network: which modules make up its blocks, and which block owns what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, takewhile

from torch import nn

from tltrain.models.chain import Block

STEM, HEAD = "stem", "head"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def grouped_blocks(
    net: nn.Module, head: str, why: str, groups: Mapping[str, Sequence[str]] | None = None, *, starts: Sequence[str] = ()
) -> list[Block]:
    """Blocks without steps, for a network that cannot be cut: it runs whole, and can be frozen, given learning rates and sharded by block.

    head: path of the classifier, which becomes the last block, `head`.
    why: why it cannot be cut, for the user (`Block.why_whole`).
    groups: block name to paths of its modules and parameters, in order, the head left out (timm's `group_matcher`). Every parameter and
        buffer but the head's must lie in exactly one. None takes the elements of the innermost repeated containers.
    starts: paths of modules that the groups begin with, in place of those elements.
    """
    if groups is None:
        groups = _by_containers(net, head, list(starts) or units(net, head))
    return [Block(name, tuple(paths), why_whole=why) for name, paths in {**groups, HEAD: (head,)}.items()]


def units(net: nn.Module, head: str) -> list[str]:
    """Paths of the elements of the innermost repeated containers, in the order of definition: `layer1.0`, `stages.2.blocks.1`.

    In a network without such a container (GoogLeNet) its own children are the units, and in plain rows of layers (VGG) each convolution.
    """
    found = [path for path in _units(net, "") if not within(head, path)]
    if len(found) > 1:
        return found
    found = [name for name, child in net.named_children() if _is_block(child) and not within(head, name)]
    if len(found) > 1:
        return found
    return [path for path, module in net.named_modules() if path != head and _is_weight(module)]


def owned(net: nn.Module, owner: Mapping[str, int], num_blocks: int) -> list[tuple[str, ...]]:
    """For each block the paths that it owns, as few as there can be: a module whose parts all belong to one block stands for them.

    owner: path of every module without children, and of every parameter and buffer of a module with children, to a block's index.
    """
    owns: list[list[str]] = [[] for _ in range(num_blocks)]

    def visit(path: str, module: nn.Module) -> None:
        parts = {owner[part] for part in parts_of(module, path)}
        if path and len(parts) == 1:
            owns[parts.pop()].append(path)
            return
        for name, _ in _tensors(module):
            owns[owner[_join(path, name)]].append(_join(path, name))
        for name, child in module.named_children():
            visit(_join(path, name), child)

    visit("", net)
    return [tuple(paths) for paths in owns]


def parts_of(module: nn.Module, path: str) -> Iterator[str]:
    """Paths of the modules without children under a module, and of the tensors of those with children, in the order of definition."""
    if path and not any(True for _ in module.children()):
        yield path
        return
    yield from (_join(path, name) for name, _ in _tensors(module))
    for name, child in module.named_children():
        yield from parts_of(child, _join(path, name))


def _by_containers(net: nn.Module, head: str, named: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What lies before the first unit is the stem; what lies between two belongs to the next, and what follows the last to the last."""
    names = [STEM, *named, HEAD]
    owner, passed = {}, 0
    for part in parts_of(net, ""):
        at = next((i for i, unit in enumerate(named, 1) if within(part, unit)), None)
        passed = passed if at is None else max(passed, at)
        owner[part] = len(names) - 1 if within(part, head) else at or min(passed + 1, len(named)) * bool(passed)
    owns = owned(net, owner, len(names))
    return {name: paths for name, paths in zip(names[:-1], owns[:-1], strict=True) if paths}


def _units(module: nn.Module, path: str) -> list[str]:
    """The units under a module. A repeated child is one, or what repeats within it is: `stages.2`, or `stages.2.blocks.1`."""
    inside = [(_join(path, name), child) for name, child in module.named_children()]
    repeats = _repeats(module)
    return list(chain.from_iterable(_units(child, at) or ([at] if repeats and _is_block(child) else []) for at, child in inside))


def _repeats(container: nn.Module) -> bool:
    """Whether two of a container's numbered children are blocks of one class, or a block is all it holds; of other modules all are."""
    children = list(container.named_children())
    kinds = Counter(type(child) for name, child in children if re.search(r"\d$", name) and _is_block(child))
    if isinstance(container, _CONTAINERS):
        return bool(kinds) and (max(kinds.values()) > 1 or len(children) == 1)
    return len(kinds) == 1 and kinds.total() == len(children)


def _is_block(module: nn.Module) -> bool:
    """Whether a module is more than one layer with its norm and activation: it holds two weights, or its own tensors beside modules."""
    return any(True for _ in module.children()) and sum(p.ndim > 1 for p in module.parameters()) > 1


def _is_weight(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and any(p.ndim > 1 for p in module.parameters(recurse=False))


def _tensors(module: nn.Module) -> Iterator[tuple[str, object]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def within(path: str, place: str) -> bool:
    return path == place or path.startswith(place + ".")


def around(*paths: str) -> str:
    """The path of the innermost module around some, "" for the net itself."""
    together = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, together))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
