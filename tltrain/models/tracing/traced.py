"""Blocks of a network that is traced with torch.fx: cut where exactly one tensor lives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from tltrain.models.chain import Block
from tltrain.models.tracing.cuts import Cuts, used
from tltrain.models.tracing.maps import last_map
from tltrain.models.tracing.program import Instruction, Ref, at
from tltrain.models.tracing.steps import head_block, with_dropout
from tltrain.models.tracing.structure import HEAD, STEM, around, owned, parts_of, units, within
from tltrain.models.tracing.tracer import CannotCut, Tracer, ghost, reason, traced
from tltrain.models.tracing.valued import ValuedTracer, images_of


def traced_blocks(
    net: nn.Module,
    head: str,
    dropout: float,
    size: int,
    *,
    leaf_functions: Sequence[Callable[..., Any]] = (),
    leaf_modules: Sequence[type[nn.Module]] = (),
    forward_defaults: Mapping[str, Any] | None = None,
    with_values: bool = False,
    starts: Sequence[str] = (),
    channels_last: tuple[str, ...] = (),
) -> list[Block]:
    """The blocks of any network that torch.fx can trace, the head last. All have steps, so the network can be cut between any two.

    Blocks are the elements of the innermost repeated containers (`layer1.0`, `blocks.3`), or the fewest of them together that can be
    cut from the rest. What comes before the first is `stem`; the final norm and the pooling belong to the last before `head`. A weight
    that two blocks read belongs to the first: while that one is frozen, so is the weight.

    net: maps normalised images (B, 3, size, size) to logits (B, classes), on any device, meta included. Its weights are not read.
    head: path of the linear classifier, which must take the pooled features (B, D) alone.
    dropout: probability for the input of the head.
    leaf_functions, leaf_modules: functions (as the network's modules call them by name) and classes of modules that are not traced into.
    forward_defaults: values of the optional arguments of the net's forward. Those left out keep their own defaults.
    with_values: whether the trace knows the shapes of images of this size, and the types. Networks of transformers ask for them.
    starts: paths of modules that blocks begin with, in place of those that are found. They are called whole.
    channels_last: as in `Block`.
    Raises CannotCut; `grouped_blocks` then gives blocks that run whole:

        try:
            return traced_blocks(net, head, dropout, size)
        except CannotCut as why:
            return grouped_blocks(net, head, str(why))
    """
    bare, found = ghost(net), list(starts) or units(net, head)
    kinds = {type(net.get_submodule(path)) for path in found} - {nn.Sequential, nn.ModuleList, nn.ModuleDict}
    make = partial(ValuedTracer, images=images_of(bare, size), units={*found, head}) if with_values else Tracer
    program, output = traced(bare, {*found, head}, (*leaf_modules, *kinds), leaf_functions, forward_defaults or {}, make)
    if not isinstance(output, Ref):
        raise CannotCut("its forward returns more than logits")
    try:
        cuts = Cuts(bare, *used(program, output), size)
    except Exception as error:  # whatever a network's code raises at a size, or at tensors without values
        raise CannotCut(f"it cannot be run without values ({reason(error)})") from error
    calls = _calls(cuts, found)
    return _blocks(net, cuts, calls, _places(net, cuts, calls, _head_place(cuts, head)), head, dropout, channels_last)


def _blocks(
    net: nn.Module,
    cuts: Cuts,
    calls: Mapping[str, tuple[int, int]],
    places: Sequence[int],
    head: str,
    dropout: float,
    channels_last: tuple[str, ...],
) -> list[Block]:
    """Blocks that end at these places, and the head."""
    steps = [cuts.segment(start, stop) for start, stop in pairwise([0, *places])]
    maps = last_map(cuts, places[-2] if len(places) > 1 else 0, places[-1])
    end = replace(head_block(head, dropout), channels_last=channels_last)
    if len(cuts.instructions) > places[-1] + 1:
        end = replace(end, step=with_dropout(head, dropout, cuts.segment(places[-1], len(cuts.instructions))))
    if cuts.baked:
        steps[0] = replace(steps[0], size=cuts.size)
    owns = owned(net, _owners(net, head, cuts, places), len(places) + 1)
    inside = [[path for path, (first, _) in calls.items() if start < first <= stop] for start, stop in pairwise([0, *places])]
    orders = [cuts.order(place) for place in (0, *places)]
    blocks = [
        Block(name, paths, step, order, tuple(called), channels_last=channels_last)
        for name, paths, step, order, called in zip(_names(inside), owns, steps, orders, inside, strict=False)
    ]
    return [*blocks[:-1], replace(blocks[-1], last_map=maps), replace(end, input_order=orders[-1])]


def _head_place(cuts: Cuts, head: str) -> int:
    """The place right before the head."""
    calls = [each for each in cuts.instructions if each.op == "module" and each.target == head]
    if len(calls) != 1:
        raise CannotCut(f"its classifier {head} is called {len(calls)} times")
    place = calls[0].number - 1
    if cuts.living(place) is None or calls[0].args != (Ref(cuts.living(place) or 0),) or calls[0].kwargs:
        raise CannotCut(f"its classifier {head} takes more than one tensor")
    return place


def _calls(cuts: Cuts, found: Iterable[str]) -> dict[str, tuple[int, int]]:
    """The units that are called, in the order of their first call, with the numbers of the first and the last."""
    calls: dict[str, tuple[int, int]] = {}
    known = set(found)
    for each in cuts.instructions:
        if each.op == "module" and each.target in known:
            path = str(each.target)
            calls[path] = (calls.get(path, (each.number, 0))[0], each.number)
    return calls


def _places(net: nn.Module, cuts: Cuts, calls: Mapping[str, tuple[int, int]], end: int) -> list[int]:
    """Where the blocks end, in order; the last is the place before the head.

    Between two units lies what feeds the second, unless its name stands nearer to the first. The stem ends as late as it can.
    """
    order = [(path, first, last) for path, (first, last) in calls.items() if first <= end]
    places = []
    if order:
        stem = [place for place in range(1, order[0][1]) if cuts.living(place) is not None]
        places += stem[-1:]
    done = 0
    for (path, _, last), (following, first, _) in pairwise(order):
        done = max(done, last)
        nearer = [each.number for each in cuts.instructions[done : first - 1] if _is_nearer(each, path, following)]
        choice = [place for place in range(done, first) if cuts.living(place) is not None]
        choice = [place for place in choice if place >= max(nearer, default=0)] or choice
        places += choice[:1]
    return [*(place for place in places if not _shares(net, cuts, place)), end]


def _shares(net: nn.Module, cuts: Cuts, place: int) -> bool:
    """Whether modules on both sides of a place hold one tensor under two names. Blocks cannot share it."""
    sides: list[dict[int, set[str]]] = [{}, {}]
    for each in cuts.instructions:
        if each.op == "module":
            module = at(net, str(each.target))
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                sides[each.number > place].setdefault(id(tensor), set()).add(f"{each.target}.{name}")
    return any(sides[0][tensor] != sides[1][tensor] for tensor in sides[0].keys() & sides[1].keys())


def _is_nearer(each: Instruction, one: str, other: str) -> bool:
    """Whether a module that is called shares more of its path with one unit than with the other."""
    if each.op != "module":
        return False
    return len(around(str(each.target), one)) > len(around(str(each.target), other))


def _owners(net: nn.Module, head: str, cuts: Cuts, places: Sequence[int]) -> dict[str, int]:
    """The block of each part of the net (`parts_of`): the first that calls or reads it. What none does belongs to the next in order."""
    parts = list(parts_of(net, ""))
    owner: dict[str, int] = dict.fromkeys(parts_of(net.get_submodule(head), head), len(places))
    for each in cuts.instructions:
        if each.op in ("module", "attribute"):
            block = sum(each.number > place for place in places)
            for part in _parts(net, str(each.target)):
                owner.setdefault(part, block)
    called = {id(tensor): block for part, block in owner.items() for tensor in _tensors(net, part)}
    following = len(places) - 1
    for part in reversed(parts):
        known = {called[id(tensor)] for tensor in _tensors(net, part) if id(tensor) in called}  # it has another name, which is called
        owner |= {part: min(known)} if part not in owner and known else {}
        following = owner.setdefault(part, following) if part not in owner or owner[part] < len(places) else following
    return {part: owner[part] for part in parts}


def _parts(net: nn.Module, path: str) -> Iterable[str]:
    """The parts that stand for a module, a parameter or a buffer."""
    parent, _, name = path.rpartition(".")
    module = net.get_submodule(parent)
    if name in module._modules:
        return parts_of(net.get_submodule(path), path)
    return [path if any(True for _ in module.children()) else parent]


def _tensors(net: nn.Module, part: str) -> Iterable[Tensor]:
    found = at(net, part)
    return [found] if isinstance(found, Tensor) else [*found.parameters(), *found.buffers()]


def _names(inside: Sequence[Sequence[str]]) -> list[str]:
    """Names for blocks of these units: the unit, the container around several if it holds no other, else the first."""
    names = []
    for number, paths in enumerate(inside):
        others = [path for group in (*inside[:number], *inside[number + 1 :]) for path in group]
        container = around(*paths) if len(paths) > 1 else ""
        name = paths[0] if paths else STEM
        name = container if container and not any(within(path, container) for path in others) else name
        names.append(f"net.{name}" if name == HEAD or (name == STEM and number) else name)
    return names
