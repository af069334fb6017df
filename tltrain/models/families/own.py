"""A network that a Python program built itself: `tltrain.chain(module, size=…)`. It is cut where the program says, or where tracing can."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType, FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tltrain.core.errors import UserError, first_line
from tltrain.core.recipe import MOST_PIXELS
from tltrain.models.chain import Block
from tltrain.models.families import resnet
from tltrain.models.family import Family, WeightsSource
from tltrain.models.metadata import WeightsMetadata
from tltrain.models.tracing import CannotCut, grouped_blocks, traced_blocks

PREFIX = "module:"
_LIBRARIES = {"torch", "torchvision", "timm", "transformers", *sys.stdlib_module_names}
"""Their code is not part of a network's fingerprint: a new version of them is no other network."""


@dataclass(frozen=True)
class OwnNetwork:
    """A module of the caller's, ready to be named as a backbone. Made by `own_network`."""

    name: str
    """As recipes and run folders know it: module:NAME."""
    module: nn.Module
    """A copy of the module as it was given, in fp32 and eval mode."""
    head: str
    """Path of the linear classifier. A new one, for the classes of the data, takes its place."""
    cuts: tuple[str, ...]
    """Paths of submodules at each of which a block begins. Empty: those that tracing finds."""
    card: WeightsMetadata
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"tltrain.chain({type(self.module).__name__}, name={self.name.removeprefix(PREFIX)!r}, head={self.head!r}, cuts={self.cuts})"


_REGISTERED: dict[str, OwnNetwork] = {}
"""The networks that a program has registered in this process, by name."""


def own_network(
    module: nn.Module, *, size: int, cuts: Sequence[str], head: str | None, name: str | None, mean: Sequence[float] | None,
    std: Sequence[float] | None, resize: int | None, interpolation: Literal["bilinear", "bicubic"],
) -> OwnNetwork:  # fmt: skip
    """As `tltrain.chain`. Raises UserError for a module that is no image classifier, and for names that it does not have."""
    _check_pixels(size, mean, std)
    called = type(module).__name__ if name is None else name
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", called):
        raise UserError(f"name is {called!r}; give one of letters, digits, - and _, which the recipe and the run folder keep")
    given = copy.deepcopy(module).float().eval().requires_grad_(True)
    _check_untied(given)
    linear = [path for path, m in given.named_modules() if isinstance(m, nn.Linear)]
    if not linear or (head is not None and head not in linear):
        what = f"head is {head!r}, which is no nn.Linear of it" if linear else "it has no nn.Linear, and a classifier is one"
        raise UserError(f"{type(module).__name__}: {what}; its nn.Linear: {', '.join(linear[-6:]) or 'none'}")
    paths = {path for path, _ in given.named_modules() if path}
    if unknown := [cut for cut in cuts if cut not in paths]:
        raise UserError(
            f"cuts has {unknown[0]!r}, and {type(module).__name__} has no such submodule; its own: {', '.join(sorted(paths)[:12])}"
        )
    classifier, notes = head or linear[-1], []
    _check_logits(given, classifier, size)
    if head is None:
        notes.append(f"its classifier is taken to be {classifier}, its last nn.Linear")
    if mean is None or std is None:
        notes.append("images are normalised by ImageNet's mean and std, since none were given")
    card = WeightsMetadata(
        PREFIX + called, {"head": classifier, "cuts": list(cuts), "code": _digest(given)}, tuple(mean or resnet.IMAGENET_MEAN),
        tuple(std or resnet.IMAGENET_STD), size, size if resize is None else resize, interpolation, None,
    )  # fmt: skip
    return OwnNetwork(card.name, given, classifier, tuple(cut for cut in cuts if cut != classifier), card, tuple(notes))


def give(network: OwnNetwork) -> None:
    """Register the network, so that recipes and run folders can name it in this process."""
    _REGISTERED[network.name] = network


class OwnFamily(Family):
    """The networks that were registered in this process (`give`). An unknown one raises UserError with the call to write."""

    def matches(self, name: str) -> bool:
        return name.startswith(PREFIX)

    def describe(self) -> dict[str, str]:
        return {}  # there is nothing to choose from at the command line

    def default_card(self, name: str) -> WeightsMetadata:
        return _registered(name).card

    def weights_in(self, name: str) -> str | None:
        """A module brings its weights."""
        return name

    def find_weights(self, name: str | None, weights: str, network: bool) -> WeightsSource | None:
        if name is None or weights != name:
            return None
        own = _registered(name)
        return WeightsSource(self, own.card, f"the module {name.removeprefix(PREFIX)} as it was given", own.module.state_dict, own.notes)

    def head_of(self, card: WeightsMetadata) -> str:
        return str(card.config["head"])

    def build(self, card: WeightsMetadata, num_classes: int) -> nn.Module:
        """A copy of the module with a head for so many classes."""
        own = _registered(card.name)
        if own.card.config != card.config:
            raise UserError(
                f"{card.name} is another network than the one that this run was trained with: its code, its layers, their attributes, its "
                "head or its cuts have changed; give the module as it was then"
            )
        net = copy.deepcopy(own.module).to(torch.get_default_device())
        old = net.get_submodule(own.head)
        assert isinstance(old, nn.Linear), "it was looked at when it was given"
        parent, _, last = own.head.rpartition(".")
        setattr(net.get_submodule(parent), last, nn.Linear(old.in_features, num_classes, bias=old.bias is not None))
        return net.eval()

    def blocks(self, net: nn.Module, card: WeightsMetadata, dropout: float) -> list[Block]:
        own = _registered(card.name)
        faster = ("cuda",) if sum(isinstance(m, nn.Conv2d) for m in net.modules()) > 3 else ()
        why = ""
        for with_values in (False, True):
            try:
                with warnings.catch_warnings():  # torch's, about code that asks a tensor without values for one
                    warnings.simplefilter("ignore")
                    found = traced_blocks(net, own.head, dropout, card.size, starts=own.cuts, with_values=with_values, channels_last=faster)
            except CannotCut as error:
                why = why or str(error)
                continue
            names = {block.name for block in found}
            if missing := [cut for cut in own.cuts if cut not in names]:
                raise UserError(
                    f"cuts has {missing[0]!r}, and {card.name} cannot be cut there: the submodule is not called by itself, or more than "
                    "one tensor goes past it; leave it out, or give no cuts"
                )
            return found
        return grouped_blocks(net, own.head, why, starts=own.cuts)

    def fitted(self, card: WeightsMetadata, size: int, classes: tuple[str, ...] | None) -> WeightsMetadata:
        """As in `Family`. Raises UserError for a size that the module cannot take."""
        if size != card.size:
            own = _registered(card.name)
            _check_logits(own.module, own.head, size)
        return replace(card, size=size, classes=classes)


FAMILY = OwnFamily()


def _registered(name: str) -> OwnNetwork:
    if name not in _REGISTERED:
        raise UserError(
            f"{name} is a module of a Python program, and no run folder keeps its code; build it there again and give it: "
            "tltrain.train(RECIPE, backbone=tltrain.chain(module, …)), or tltrain.load(RUN, backbone=…)"
        )
    return _REGISTERED[name]


def _check_pixels(size: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or not 8 <= size <= MOST_PIXELS:
        raise UserError(f"size is {size!r}; give the side of the images that the module takes, 8 to {MOST_PIXELS} pixels")
    for what, values in (("mean", mean), ("std", std)):
        if values is not None and (len(values) != 3 or (what == "std" and min(values) <= 0)):
            raise UserError(f"{what} is {list(values)}; give three numbers, one for each channel" + ", above 0" * (what == "std"))


def _check_untied(module: nn.Module) -> None:
    first: dict[int, str] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if (other := first.setdefault(id(tensor), name)) != name:
            raise UserError(f"{type(module).__name__}: {other} and {name} are one tensor, which no list of blocks can own; untie them")


@torch.no_grad()
def _check_logits(module: nn.Module, head: str, size: int) -> None:
    """Raise UserError unless images (2, 3, size, size) become what the head returns."""
    last: list[Any] = []
    hook = module.get_submodule(head).register_forward_hook(lambda _, __, out: last.append(out))
    try:
        out = module(torch.zeros(2, 3, size, size))
    except Exception as error:  # whatever a module's code raises
        why = first_line(error)[:160]
        raise UserError(f"{type(module).__name__} cannot take images (2, 3, {size}, {size}): {type(error).__name__}: {why}") from error
    finally:
        hook.remove()
    if len(last) != 1 or not isinstance(out, Tensor) or out.shape != last[0].shape or out.ndim != 2 or not torch.equal(out, last[0]):
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(
            f"{type(module).__name__} returns {shape}, which is not what its classifier {head} returns; give head=, the path of the "
            "nn.Linear whose answers (B, classes) the network returns"
        )


def _digest(module: nn.Module) -> str:
    """Hash of a module's layers and settings, and of the code that they run, without comments and layout. Its weights have their own.

    Code is that of the classes, and of the functions and constants which that code names. What a library holds is not looked into.
    """
    seen: set[int] = set()
    lines = [f"{path} {type(m).__qualname__} {m.extra_repr()} {_settings(m, seen)}" for path, m in module.named_modules()]
    passing = (name for name, _ in module.named_buffers() if name not in module.state_dict())
    lines += [f"{name} {_plain(module.get_buffer(name), seen)}" for name in passing]
    classes = {cls for m in module.modules() for cls in type(m).__mro__ if not _of_library(cls)}
    lines += [f"{cls.__qualname__} {_code(cls, seen)}" for cls in sorted(classes, key=lambda cls: f"{cls.__module__}.{cls.__qualname__}")]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


_INNER = frozenset(vars(nn.Module()))
"""Attributes that every module has: parameters, hooks, the training flag."""


def _of_library(of: Any) -> bool:
    return (getattr(of, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _settings(module: nn.Module, seen: set[int]) -> str:
    """The attributes of a module that are no tensors of its own. Of a library's, those that its constructor is given, such as num_heads."""
    named = set(inspect.signature(type(module).__init__).parameters) if _of_library(type(module)) else set(vars(module))
    held = {name: value for name, value in vars(module).items() if name in named - _INNER}
    return " ".join(f"{name}={_plain(held[name], seen)}" for name in sorted(held))


def _plain(value: Any, seen: set[int]) -> str:
    """A value as text that is the same in every process. Objects of unknown kinds count by their type alone."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return repr(value)
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype}{tuple(value.shape)}{hashlib.blake2b(raw, digest_size=16).hexdigest()}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_plain(of, seen)}" for key, of in value.items() if isinstance(key, (str, int))) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_plain(of, seen) for of in value)}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_plain(of, seen) for of in value))}}}"
    if inspect.isfunction(value):
        return value.__qualname__ if _of_library(value) else _function(value, seen)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__} {_plain(vars(value), seen)}" if hasattr(value, "__dict__") else repr(value)
    return type(value).__qualname__


def _code(cls: type, seen: set[int]) -> str:
    """The methods and values of a class. Of a class in a notebook Python finds the source of its methods alone."""
    found = {name: getattr(value, "__func__", getattr(value, "fget", value)) for name, value in vars(cls).items()}
    kept = {name: of for name, of in found.items() if inspect.isfunction(of) or not name.startswith("__")}
    return "\n".join(f"{name} {_plain(of, seen)}" for name, of in sorted(kept.items()))


def _function(function: FunctionType, seen: set[int]) -> str:
    """The source of a function, followed by the global functions and plain values that it uses. Each once."""
    if id(function) in seen:
        return function.__qualname__
    seen.add(id(function))
    names, codes = set[str](), [function.__code__]
    for code in codes:  # those of functions inside it are added on the way
        names |= set(code.co_names)
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    outside = {name: of for name, of in function.__globals__.items() if name in names}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is still empty
            outside[name] = cell.cell_contents
    return "\n".join([_source(function), *(f"{name}={_plain(outside[name], seen)}" for name in sorted(outside))])


def _source(method: Callable[..., Any]) -> str:
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(method))))
    except (OSError, TypeError, SyntaxError):  # at the prompt of Python before 3.13, which keeps no source
        code = method.__code__
        return f"{code.co_code.hex()} {code.co_names} {code.co_consts}"
