"""Builds a recipe's backbone as a Chain, with its weights, metadata and preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tltrain.core import recipe
from tltrain.core.errors import UserError, first_line
from tltrain.data.views import Preprocess
from tltrain.models.chain import Chain, merged
from tltrain.models.family import Family, WeightsSource, names
from tltrain.models.metadata import WeightsMetadata, read_card, write_weights
from tltrain.models.weight_files.misfit import check_fit
from tltrain.models.weight_files.names import listed
from tltrain.models.weights import find

__all__ = ["Loaded", "WeightsMetadata", "load", "names", "read_card", "skeleton", "write_weights"]


_MOST_TRIES = 4
"""Maximum number of rounds of merging blocks that cannot be cut apart."""


@dataclass(frozen=True)
class Loaded:
    """A backbone with its weights loaded."""

    chain: Chain
    card: WeightsMetadata
    """Metadata of this chain: its image size and classes, which may differ from those of the weights file."""
    family: Family
    origin: str
    """One line for the user: the source of the weights, the tensors left out, and the values assumed."""

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(self.card.size, self.card.resize, self.card.interpolation)


def load(
    spec: recipe.Backbone, *, classes: Sequence[str], size: int | None, resize: int | None, head: Literal["new", "keep"], seed: int,
    source: WeightsSource | None = None,
) -> Loaded:  # fmt: skip
    """Load a backbone on the CPU, in fp32 and eval mode, with all parameters requiring gradients.

    classes: the data's class names, in order.
    head: "new" for a head for these classes, with weights and bias zero. "keep" for the head in the weights (a teacher, or a run to
        evaluate), which must have the same classes in the same order.
    size, resize: of images, in pixels. None takes the values of the weights (for resize, their ratio of resize to size).
    seed: for random weights. torch's global generator keeps its state.
    source: of the same weights, where it was opened before (`weights.open_once`).
    Raises UserError where weights are missing or do not fit, with the names of the tensors.
    """
    source = source or find(spec, network=True)
    card = _fitted(source, spec, size, resize, tuple(classes))
    if head == "new":
        card = replace(card, temperature=1.0, thresholds=None)  # both were fitted for the old head
    if source.read is None:
        if head == "keep":
            raise UserError(f"backbone.weights of {card.name} is null, and random weights have no head to keep; give trained weights")
        return _loaded(_random_net(source.family, card, seed), source.family, card, spec, [f"random weights, seed {seed}", *source.notes])
    state = source.read()
    lines = [source.origin, *source.notes]
    if head == "keep":
        _check_head(source, state, tuple(classes))
    else:
        state, line = _without_head(source, state)
        lines.append(line)
    _check_fit(source, state)
    state, resized = source.family.resized(state, source.card, card.size)
    return _loaded(_net(state, source.family, card), source.family, card, spec, [*lines, *resized])


def skeleton(spec: recipe.Backbone, num_classes: int, size: int | None, resize: int | None) -> Loaded:
    """Build the same chain on the meta device, for a plan. Reads no weights and downloads nothing. Raises UserError."""
    source = find(spec, network=False)
    card = _fitted(source, spec, size, resize, None)
    with torch.device("meta"):
        net = source.family.build(card, num_classes)
    return _loaded(net, source.family, card, spec, [source.origin, *source.notes])


def _fitted(
    source: WeightsSource, spec: recipe.Backbone, size: int | None, resize: int | None, classes: tuple[str, ...] | None
) -> WeightsMetadata:
    """The metadata of the weights with the recipe's overrides, for these classes. Raises UserError."""
    card = source.card
    side = card.size if size is None else size
    shorter = round(side * card.resize / card.size) if resize is None else resize
    if shorter < side:
        raise UserError(f"data.resize is {shorter}, and the crop taken from it has {side} pixels; set it to at least that, or to null")
    mean = card.mean if spec.mean is None else spec.mean
    std = card.std if spec.std is None else spec.std
    return source.family.fitted(replace(card, mean=mean, std=std, resize=shorter), side, classes)


def _random_net(family: Family, card: WeightsMetadata, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = family.build(card, _num_classes(card))
    for path in family.heads_of(card):
        _reset(net.get_submodule(path))
    return net


def _reset(head: nn.Module) -> None:
    """Set a new head to zero. A convolution (SqueezeNet's) gets small weights: behind it a ReLU would hold zeros for ever."""
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    if isinstance(head, nn.Conv2d):
        nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(0))


def _net(state: Mapping[str, Tensor], family: Family, card: WeightsMetadata) -> nn.Module:
    """Build the net and load this state in fp32. A head that the state lacks is set to zero."""
    with torch.device("meta"):
        net = family.build(card, _num_classes(card))
    if _has_tables(net):
        with torch.random.fork_rng(devices=[]):
            net = family.build(card, _num_classes(card))
    head = {name: torch.zeros(t.shape) for name, t in net.state_dict().items() if name not in state}
    # copies: tensors read from a safetensors file are memory-mapped, and the file may be replaced while the run goes on
    own = {name: t.to(torch.float32, copy=True) if t.is_floating_point() else t.clone() for name, t in state.items()}
    net.load_state_dict({**head, **own}, assign=True)
    if head:
        for path in family.heads_of(card):
            _reset(net.get_submodule(path))
    return net


def _has_tables(net: nn.Module) -> bool:
    """Whether the net has tensors that no state dict has, such as Swin's masks and DINOv3's rotary tables. It computes them when built."""
    kept = net.state_dict()
    plain = any(isinstance(value, Tensor) for module in net.modules() for value in vars(module).values())
    return plain or any(name not in kept for name, _ in net.named_buffers())


def _loaded(net: nn.Module, family: Family, card: WeightsMetadata, spec: recipe.Backbone, lines: Sequence[str]) -> Loaded:
    try:
        chain = Chain(net, family.blocks(net, card, spec.dropout), card.mean, card.std).eval()
    except ValueError as error:  # weights that two blocks share, above all
        raise UserError(f"{card.name} cannot be trained block by block: {error}; name another network") from error
    chain, note = _held_against_the_net(chain, family, card)
    lines = [*lines, *note]
    if chain.runs_whole and spec.dropout > 0:
        for path in family.heads_of(card):
            drop_before(net, path, spec.dropout)
    if chain.why_whole:
        lines = [*lines, f"it runs whole, no block can be cut off: {chain.why_whole}"]
    return Loaded(chain, card, family, "; ".join(lines))


class _Overwritten(ValueError):
    """A block writes into what it is given."""


@torch.no_grad()
def head_input(chain: Chain, head: str, x_BCHW: Tensor) -> Tensor:
    """The input of the classifier at the path `head` when the network runs as a whole."""
    given: list[Tensor] = []
    hook = chain.net.get_submodule(head).register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    try:
        chain.net(chain.normalise(x_BCHW))
    finally:
        hook.remove()
    return given[0]


@torch.no_grad()
def cut_everywhere(chain: Chain, x_BCHW: Tensor) -> Tensor:
    """What the head is given where each block below it is given what a cache would give it: a contiguous copy.

    Raises ValueError for a block that overwrites it.
    """
    x = x_BCHW
    for k in range(len(chain.blocks) - 1):
        copy = x.clone(memory_format=torch.contiguous_format)
        out = chain(copy, start=k, stop=k + 1)
        if not torch.equal(copy, x):
            raise _Overwritten(f"block {chain.blocks[k].name} overwrites what it is given")
        x = out
    return x


def _held_against_the_net(chain: Chain, family: Family, card: WeightsMetadata) -> tuple[Chain, list[str]]:
    """The chain, and a line about blocks that were merged. Its blocks are the net's on two random images, in one go and cut before each.

    Blocks around a wrong cut are merged, and held against the net again; it runs whole where that does not help. Our own families are
    tested with all of their networks, and a skeleton has no values.
    """
    if chain.runs_whole or family.blocks_are_tested or any(p.is_meta for p in chain.net.parameters()):
        return chain, []
    images_BCHW = torch.rand((2, 3, card.size, card.size), generator=torch.Generator().manual_seed(0))
    want = head_input(chain, family.head_of(card), images_BCHW)
    held, why = chain, None
    try:
        for _ in range(_MOST_TRIES):
            if (why := _difference(held, want, images_BCHW)) is None:
                joined = "; ".join(f"{block.name} with {', '.join(block.also)}" for block in held.blocks if block.also)
                return held, [f"merged, since a cut between them changes the last bits: {joined}"] if joined else []
            if not (wrong := _wrong_cuts(held, images_BCHW)):
                break
            held = Chain(chain.net, merged(held.blocks, wrong), card.mean, card.std).eval()
    except Exception as error:  # whatever its code raises when it runs in parts
        why = f"its blocks raise {type(error).__name__}: {first_line(error)[:120]}"
    return Chain(chain.net, [replace(block, step=None, why_whole=why or "") for block in chain.blocks], card.mean, card.std).eval(), []


@torch.no_grad()
def _difference(chain: Chain, want: Tensor, images_BCHW: Tensor) -> str | None:
    """How the blocks differ from the network, of which `want` is what the head is given: a new head is zero. None if they do not."""
    try:
        whole, cut = chain(images_BCHW, stop=len(chain.blocks) - 1), cut_everywhere(chain, images_BCHW)
    except _Overwritten as error:
        return str(error)
    got = {"the network itself": whole, "the network cut before each of them": cut}
    off = {what: float((features - want).abs().max()) for what, features in got.items() if not torch.equal(features, want)}
    return "; ".join(f"its blocks differ from {what} by {by:.1e}" for what, by in off.items()) or None


@torch.no_grad()
def _wrong_cuts(chain: Chain, images_BCHW: Tensor) -> list[int]:
    """Blocks that answer a contiguous copy otherwise than what the block before them gives, or overwrite it."""
    wrong, x = [], chain.normalise(images_BCHW)
    for k, block in enumerate(chain.blocks[:-1]):
        assert block.step is not None, "else the net runs whole"
        before, copy = x.clone(), x.clone(memory_format=torch.contiguous_format)
        x = block.step(chain.net, x)
        if k and not (torch.equal(chain(copy, start=k, stop=k + 1), x) and torch.equal(copy, before)):
            wrong.append(k)
    return wrong


def _num_classes(card: WeightsMetadata) -> int:
    assert card.classes is not None, "only a skeleton's card is without classes"
    return len(card.classes)


def _without_head(source: WeightsSource, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Returns (the state without its head, a line about the head for the user)."""
    heads = _prefixes(source)
    weight = state.get(f"{heads[0]}weight")
    line = "they have no head" if weight is None else f"their head for {len(weight)} classes left out"
    return {name: t for name, t in state.items() if not name.startswith(heads)}, line


def _prefixes(source: WeightsSource) -> tuple[str, ...]:
    """Prefixes of the heads' tensor names."""
    return tuple(f"{head}." for head in source.family.heads_of(source.card))


def _check_head(source: WeightsSource, state: Mapping[str, Tensor], classes: tuple[str, ...]) -> None:
    """Check that the head in the weights has these classes, in this order. Raises UserError with the difference."""
    origin, known = source.origin, source.card.classes
    if not any(name.startswith(_prefixes(source)) for name in state):
        raise UserError(f"weights {origin} have no head, and one for {len(classes)} classes is needed; train one first, and give that run")
    if known is None:
        raise UserError(f"weights {origin} do not say which classes their head knows; give a run folder or a folder of save_pretrained")
    if known == classes:
        return
    differ = [
        listed("the data lacks", set(known) - set(classes)),
        listed("the weights lack", set(classes) - set(known)),
    ]
    what = "; ".join(filter(None, differ)) or f"the same names in another order: {', '.join(known)} against {', '.join(classes)}"
    raise UserError(f"weights {origin} know {len(known)} classes, and the data has {len(classes)}; {what}. They must be the same")


def _check_fit(source: WeightsSource, state: Mapping[str, Tensor]) -> None:
    card, heads = source.card, _prefixes(source)
    weight = state.get(f"{heads[0]}weight")
    with torch.device("meta"):
        net = source.family.build(card, 1 if weight is None else len(card.classes or weight))
    check_fit(net, state, source.origin, card.name, without=None if weight is not None else heads)


def drop_before(net: nn.Module, path: str, dropout: float) -> None:
    """Add dropout in front of the head of a net that runs as a whole, by a forward pre-hook."""
    net.get_submodule(path).register_forward_pre_hook(partial(_dropout_input, dropout))


def _dropout_input(dropout: float, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (F.dropout(args[0], dropout, head.training), *args[1:])
