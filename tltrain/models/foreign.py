"""Weights that another program wrote: a file's tensors under a network's names, and which network they look like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tltrain.core import untrusted
from tltrain.core.errors import UserError
from tltrain.models.family import Family, WeightsSource, find_family, names
from tltrain.models.metadata import WeightsMetadata, checked
from tltrain.models.weight_files import reading
from tltrain.models.weight_files.containers import state_dict_in
from tltrain.models.weight_files.fit import Fitted, Shapes, by_order, fit
from tltrain.models.weight_files.misfit import differences, width
from tltrain.models.weight_files.recognise import recognise
from tltrain.models.weight_files.twins import converted
from tltrain.runs import manifest

EXPORTED, DESCRIPTION = "model.pth", "model.json"
"""The two files of `tltrain export --to torchvision`."""


def from_file(family: Family | None, name: str | None, path: Path) -> WeightsSource:
    """The weights in a file without metadata of ours, for the network `name` of this family. Raises UserError.

    They are read at once, so that a plan too says what does not fit. Only the names and shapes are, where the format allows.
    """
    content, in_order = reading.read(path)
    state, notes = state_dict_in(content, path)
    if (card := _described(path)) is not None:
        family, name = find_family(card.name), card.name
        assumed = (f"names of classes, mean, std and size are those in {DESCRIPTION} beside it",)
    elif family is None or name is None:
        like = recognise(state)
        raise UserError(
            f"backbone.name is null, and {path}, a file without metadata, cannot say which network it is; "
            + (f"it looks like {_spoken(like)}: {_remedy(like[0])}" if like else f"give a name: {', '.join(names())}")
        )
    else:
        card = family.default_card(name)
        assumed = (f"the file says nothing of itself: size, mean and std are assumed from the name {name}",)
    assert family is not None, "a described file's family is known"
    return _source(family, card, path, state, in_order, notes, assumed)


def from_described_file(family: Family, card: WeightsMetadata, path: Path, notes: tuple[str, ...]) -> WeightsSource:
    """The weights in a file whose metadata another file has given. notes: on that metadata. Raises UserError."""
    content, in_order = reading.read(path)
    state, taken = state_dict_in(content, path)
    return _source(family, card, path, state, in_order, taken, notes)


def _source(
    family: Family,
    card: WeightsMetadata,
    path: Path,
    state: dict[str, Tensor],
    in_order: bool,
    taken: tuple[str, ...],
    notes: tuple[str, ...],
) -> WeightsSource:
    card, resized = _sized(family, card, state)
    fitted = _fitted(family, card, state, in_order, path)
    card, epsilon = _with_epsilon(card, fitted)
    read = partial(_read, family, card, fitted.state, path, in_order)
    return WeightsSource(family, card, str(path), read, (*taken, *fitted.notes, *epsilon, *resized, *notes))


def _read(family: Family, card: WeightsMetadata, state: dict[str, Tensor], path: Path, of_torch: bool) -> dict[str, Tensor]:
    if of_torch:
        reading.check_whole(path)
        return state
    manifest.check(path)
    return family.converted(state, card, str(path))


def _described(path: Path) -> WeightsMetadata | None:
    """The metadata beside an export of ours to torchvision. None for any other file. Raises UserError."""
    file = path.with_name(DESCRIPTION)
    if path.name != EXPORTED or not file.is_file():
        return None
    raw: Any = untrusted.read_json(file)
    keys = ("name", "mean", "std", "size", "resize", "interpolation", "classes")
    if not isinstance(raw, dict) or not set(keys) <= set(raw):
        return None
    for name in (raw["name"], f"torchvision:{raw['name']}"):
        if isinstance(name, str) and (family := find_family(name)) is not None:
            values: dict[str, Any] = {key: tuple(raw[key]) if isinstance(raw[key], list) else raw[key] for key in keys[1:]}
            card = checked(replace(family.default_card(name), **values), str(file))
            return family.fitted(card, card.size, card.classes)
    raise UserError(f"{file} names the network {untrusted.cut(raw['name'])}, which no package here provides; install the one it is from")


def _fitted(family: Family, card: WeightsMetadata, state: dict[str, Tensor], in_order: bool, path: Path) -> Fitted:
    """The tensors under the names of the network. Raises UserError with what differs, and what they look like."""
    head = family.head_of(card)
    several = len(family.heads_of(card)) > 1 and f"{head}.weight" in state  # then `fit` takes the others for parts of the body
    want = _shapes(family, card, len(state[f"{head}.weight"]) if several else 1)
    fitted = fit(state, want, head, str(path))
    like = recognise(state)
    if isinstance(fitted, str) and (not like or _is_one_of(card.name, like)):  # not for what is known to be another network
        fitted = _by_family(family, card, state, want, path) or fitted
    if isinstance(fitted, str) and in_order and (ordered := by_order(state, want, head)) is not None:
        fitted = ordered
    if isinstance(fitted, Fitted):
        return _checked_head(fitted, want, head, path, card.name)
    prefix = fitted
    theirs, _, own = prefix.partition("-")
    inner = {own + name.removeprefix(theirs): tensor for name, tensor in state.items() if name.startswith(theirs)}
    if (twin := converted(inner, [key for key in want if not key.startswith(f"{head}.")])) is not None:
        inner = twin.state
    raise UserError(f"weights {path} do not fit {card.name}: {_misfit(inner, state, want, head, card.name, theirs)}")


def _by_family(family: Family, card: WeightsMetadata, state: dict[str, Tensor], want: Shapes, path: Path) -> Fitted | None:
    """The tensors as the family itself converts them, such as those of the authors' own code. None where it cannot."""
    try:
        fitted = fit(family.converted(state, card, str(path)), want, family.head_of(card), str(path))
    except UserError:
        return None
    line = f"their names were converted to those of {card.name}"
    return replace(fitted, notes=(line, *fitted.notes)) if isinstance(fitted, Fitted) else None


def _misfit(inner: Mapping[str, Tensor], state: Mapping[str, Tensor], want: Shapes, head: str, name: str, prefix: str) -> str:
    body = {key: shape for key, shape in want.items() if not key.startswith(f"{head}.")}
    rest = {key: tensor for key, tensor in inner.items() if not key.startswith(f"{head}.")}
    like = recognise(inner) or recognise(state)
    said = [differences(rest, body) or "", width(rest, body, name) or ""]
    if prefix:
        said.append(f"the prefix {prefix} was left out of the comparison")
    if _is_one_of(name, like):
        said.append(f"the shapes are those of {name}, but neither the names nor their order are; rename the tensors to those of {name}")
    elif like:
        said.append(f"this looks like {_spoken(like)}: {_remedy(like[0])}")
    return "; ".join(filter(None, said))


def _checked_head(fitted: Fitted, want: Shapes, head: str, path: Path, name: str) -> Fitted:
    """The tensors with a head only of the network's own form. Raises UserError for a head on features of another width."""
    own = {key: shape for key, shape in want.items() if key.startswith(f"{head}.")}
    theirs = {key: tensor for key, tensor in fitted.state.items() if key.startswith(f"{head}.")}
    if not theirs or (theirs.keys() == own.keys() and all(tuple(t.shape)[1:] == own[key][1:] for key, t in theirs.items())):
        return fitted
    if theirs.keys() == own.keys():
        shapes = {key: (len(theirs[key]), *own[key][1:]) for key in own}
        raise UserError(f"weights {path} do not fit {name}: {differences(theirs, shapes)}")
    line = f"their head, {', '.join(sorted(theirs)[:4])}, is not of the network's form and left out"
    return Fitted({key: t for key, t in fitted.state.items() if key not in theirs}, (*fitted.notes, line), fitted.epsilon)


def _shapes(family: Family, card: WeightsMetadata, num_classes: int = 1) -> dict[str, tuple[int, ...]]:
    """The tensors of a network, in its own order."""
    with torch.device("meta"):
        net = family.build(card, num_classes)
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def _sized(family: Family, card: WeightsMetadata, state: Mapping[str, Tensor]) -> tuple[WeightsMetadata, tuple[str, ...]]:
    """Returns (the metadata for the image size that the position embeddings are for, a line where that is not the network's own)."""
    theirs = [t.shape for name, t in state.items() if t.ndim == 3 and t.shape[0] == 1 and "pos" in name.rpartition(".")[2]]
    if len(theirs) != 1:
        return card, ()
    ours = [shape for name, shape in _shapes(family, card).items() if len(shape) == 3 and "pos" in name.rpartition(".")[2]]
    if len(ours) != 1 or ours[0][2] != theirs[0][2] or ours[0][1] == theirs[0][1]:
        return card, ()
    for extra in (1, 0, 2):  # tokens besides the patches: of the class, and of distillation
        side, was = (math.isqrt(max(0, shape[1] - extra)) for shape in (theirs[0], ours[0]))
        if side**2 + extra == theirs[0][1] and was**2 + extra == ours[0][1] and card.size * side % was == 0:
            size = card.size * side // was
            try:
                other = replace(family.fitted(card, size, None), resize=round(card.resize * size / card.size))
            except UserError:
                return card, ()
            return other, (f"their position embeddings are for images of {size} px",)
    return card, ()


def _with_epsilon(card: WeightsMetadata, fitted: Fitted) -> tuple[WeightsMetadata, tuple[str, ...]]:
    """Returns (the metadata with the epsilon of the twin's LayerNorms, a line where the network cannot have it)."""
    if fitted.epsilon is None:
        return card, ()
    if "layer_norm_eps" in card.config:
        return replace(card, config={**card.config, "layer_norm_eps": fitted.epsilon}), ()
    return card, (f"its LayerNorms add {fitted.epsilon:g} to the variance, and those of {card.name} another small number",)


def _is_one_of(name: str, like: Sequence[str]) -> bool:
    """Whether a backbone's name, such as resnet18 or timm:resnet18.a1_in1k, is among recognised networks."""
    return any(known.partition(":")[2] == name.split(":")[-1].split(".")[0] for known in like)


def _spoken(like: Sequence[str]) -> str:
    return " or ".join(f"{library}'s {name}" for library, _, name in (known.partition(":") for known in like))


def _remedy(like: str) -> str:
    """The settings to suggest where weights look like this network."""
    library, _, name = like.partition(":")
    for known in (name, like) if library == "torchvision" else (like,):
        if find_family(known) is not None:
            return f"set backbone.name to {known}"
    return f"no package here provides it; `pip install 'tltrain[{library}]'` may" if library == "timm" else "which is not provided here"
