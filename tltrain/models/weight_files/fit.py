"""Brings the tensors of a file under the names of a network: by a prefix, by another library's names, or by their order.

Each way is tried only where it accounts for every tensor of the network, and says what it did. What none can account for is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tltrain.core.errors import UserError
from tltrain.models.weight_files import twins
from tltrain.models.weight_files.names import listed

Shapes = Mapping[str, tuple[int, ...]]
_COUNT = ".num_batches_tracked"
"""BatchNorm's count of batches. Files of torch before 0.4.1 lack it, and nothing here reads it."""
_WRAPPERS = ("module", "_orig_mod", "model", "backbone", "encoder", "net", "network", "base_model", "student", "teacher", "trunk")


@dataclass(frozen=True)
class Fitted:
    """Tensors under the names of a network."""

    state: dict[str, Tensor]
    """All tensors of the network, without its head where the file has none."""
    notes: tuple[str, ...]
    epsilon: float | None = None
    """Of the LayerNorms, where the names were another library's, whose value may differ from the network's."""


def fit(state: Mapping[str, Tensor], want: Shapes, head: str, origin: str) -> Fitted | str:
    """Bring a state dict under the names of a network, by a prefix or by another library's names.

    want: the tensors of the network, in its own order. The number of classes does not matter.
    head: path of its classifier. Other shapes of the head are for the caller to check.
    origin: of the weights, for messages.
    Returns the prefix under which most names agree where it does not fit. Raises UserError where the network is in the file twice.
    """
    body = {name: shape for name, shape in want.items() if not name.startswith(f"{head}.")}
    if len(copies := _before(state, body)) > 1 and not body.keys() <= state.keys():
        raise UserError(
            f"weights {origin} hold the network {len(copies)} times, under {', '.join(copies)}; "
            f"save the one you want as a file of its own, such as the tensors whose names begin with {copies[0]}"
        )
    best, most = "", -1
    for prefix, inner in _ways(state, body):
        agree = len(inner.keys() & body.keys())
        if agree > most:
            best, most = prefix, agree
        filled, counts = _with_counts(inner, body)
        if _agree(filled, body, head):
            return Fitted(filled, (*_prefix_note(prefix, state, inner), *counts))
    for prefix, inner in _ways(state, body):
        twin = twins.converted(inner, [name for name in body if not name.endswith(_COUNT)])
        if twin is not None:
            filled, counts = _with_counts(_shaped(twin.state, body), body)
            if _agree(filled, body, head):
                return Fitted(filled, (*_prefix_note(prefix, state, inner), twin.line, *counts), twin.epsilon)
    return best


def _ways(state: Mapping[str, Tensor], body: Shapes) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields (prefix, the tensors behind it): none, wrappers that all names share, and what stands before a name of the network.

    A prefix with a minus is one that the network has and the file lacks.
    """
    yield "", dict(state)
    prefixes = dict.fromkeys((*_shared(state), *_before(state, body)))
    for prefix in prefixes:
        yield prefix, {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    first = {name.partition(".")[0] for name in body}
    if len(first) == 1:
        own = f"{first.pop()}."
        for prefix in ("", *prefixes):
            inner = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            yield f"{prefix}-{own}", {name if name.startswith(own) else own + name: tensor for name, tensor in inner.items()}


def _shared(state: Mapping[str, Tensor]) -> Iterator[str]:
    """The wrappers around all names: "module.", then "module.model." and so on."""
    prefix, names = "", list(state)
    while names:
        first = {name.removeprefix(prefix).partition(".")[0] for name in names}
        if len(first) > 1 or (part := first.pop()) not in _WRAPPERS:
            return
        prefix += f"{part}."
        if not all(name.startswith(prefix) for name in names):
            return
        yield prefix


def _before(state: Mapping[str, Tensor], body: Shapes) -> list[str]:
    """The common prefix of the network's tensor names in the file, if all of them have one."""
    if not body:
        return []
    rare = max(body, key=len)
    found = [name.removesuffix(rare) for name in state if name.endswith(f".{rare}")]
    return [prefix for prefix in found if all(prefix + name in state for name in body if not name.endswith(_COUNT))]


def _agree(inner: Mapping[str, Tensor], body: Shapes, head: str) -> bool:
    """Whether the tensors are those of the network, with or without a head."""
    rest = {name for name in inner if not name.startswith(f"{head}.")}
    return rest == body.keys() and all(tuple(inner[name].shape) == shape for name, shape in body.items())


def _with_counts(inner: Mapping[str, Tensor], body: Shapes) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns (the tensors with BatchNorm's counts, a line about them where all were missing)."""
    counts = [name for name in body if name.endswith(_COUNT)]
    if not counts or any(name in inner for name in counts):
        return dict(inner), ()
    line = f"BatchNorm's counts of batches are missing ({len(counts)}) and set to 0, which changes no result"
    return {**inner, **{name: torch.zeros((), dtype=torch.int64) for name in counts}}, (line,)


def _shaped(state: Mapping[str, Tensor], body: Shapes) -> dict[str, Tensor]:
    """The tensors in the shapes of the network where only sides of 1 differ, as of a linear layer and a 1x1 convolution."""
    shaped = {}
    for name, tensor in state.items():
        want = body.get(name, tuple(tensor.shape))
        equal = [side for side in tensor.shape if side != 1] == [side for side in want if side != 1]
        shaped[name] = tensor.reshape(want) if equal else tensor
    return shaped


def _prefix_note(prefix: str, state: Mapping[str, Tensor], inner: Mapping[str, Tensor]) -> Iterator[str]:
    theirs, _, own = prefix.partition("-")
    if theirs:
        yield f"all {len(inner)} names stripped of {theirs}"
        if left_out := [name for name in state if not name.startswith(theirs)]:
            yield f"left out, as they stand beside it: {listed('tensors', left_out)}"
    if own:
        yield f"their names lack the network's {own}, which was put in front"


def by_order(state: Mapping[str, Tensor], want: Shapes, head: str) -> Fitted | None:
    """The tensors under the network's names, one after the other. None where that is not safe.

    state: in the order of the network that it is from. want, head: as in `fit`.

    Names alone cannot say that this is right. So it is done only where no tensor is left over on either side, every shape is equal, every
    name ends alike (weight, bias, running_mean), the tensors of each module stay together, and no name means another place.
    """
    body = {name: shape for name, shape in want.items() if not name.startswith(f"{head}.")}
    ours = [name for name in want if not name.endswith(_COUNT)]
    theirs = [name for name in state if not name.endswith(_COUNT)]
    without_head = [name for name in ours if name in body]
    ours = ours if len(ours) == len(theirs) else without_head
    if len(ours) != len(theirs) or not ours:
        return None
    modules: dict[str, str] = {}
    for mine, other in zip(ours, theirs, strict=True):
        (own_module, _, own_leaf), (module, _, leaf) = mine.rpartition("."), other.rpartition(".")
        equal = tuple(state[other].shape) == want[mine] if mine in body else tuple(state[other].shape)[1:] == want[mine][1:]
        if leaf != own_leaf or not equal or modules.setdefault(own_module, module) != module or (other in want and other != mine):
            return None
    if len(set(modules.values())) != len(modules):
        return None
    found = {mine: state[other] for mine, other in zip(ours, theirs, strict=True)}
    counted = {own + _COUNT: state[module + _COUNT] for own, module in modules.items() if module + _COUNT in state}
    found, counts = _with_counts({**found, **counted}, body)
    if not body.keys() <= found.keys():
        return None
    line = (
        f"none of their names is the network's; the {len(ours)} tensors were taken in their order, in which every shape, the end of every "
        f"name and the modules are equal ({theirs[0]} as {ours[0]}, {theirs[-1]} as {ours[-1]})"
    )
    return Fitted(found, (line, *counts))
