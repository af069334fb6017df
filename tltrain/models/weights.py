"""Finds and reads the weights of `backbone.weights`: shipped, a file, a run folder, a hub id or a torchvision name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, replace
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from tltrain.core import recipe
from tltrain.core.errors import UserError
from tltrain.models import foreign
from tltrain.models.family import Family, WeightsSource, families, family_of, find_family, names
from tltrain.models.metadata import WeightsMetadata, read_card, read_state
from tltrain.models.weight_files import reading
from tltrain.runs import run_dir

DEFAULT = "DEFAULT"
"""The weights that a network's family recommends."""
_SHIPPED = "shipped:"


def find(spec: recipe.Backbone, *, network: bool) -> WeightsSource:
    """Find the weights of a recipe's backbone and read their metadata. Downloads only with `network`. Raises UserError."""
    family = None if spec.name is None else family_of(spec.name)
    weights = spec.weights
    if weights is None and family is not None and spec.name is not None:
        weights = family.weights_in(spec.name)
    if weights is None:
        return _unread(family, spec.name, "random weights")
    if weights == DEFAULT:
        if family is None or spec.name is None:
            raise UserError(f"backbone.weights is {DEFAULT} and backbone.name is null; name the network whose weights are meant")
        weights = family.default_weights(spec.name) or weights
    source = _find(family, spec.name, weights, network)
    if family is not None and spec.name is not None and (why := family.mismatch(spec.name, source.card)) is not None:
        raise UserError(f"backbone.name is {spec.name}, and the weights {source.origin} {why}; or set the weights to {DEFAULT}")
    return source


def open_once(spec: recipe.Backbone) -> WeightsSource:
    """As `find` with a network, but the tensors are read once and kept while the source is, for a fingerprint and then a net."""
    source = find(spec, network=True)
    return source if source.read is None else replace(source, read=cache(source.read))


def fingerprint(source: WeightsSource) -> str | None:
    """Hash of weights and their metadata. None for random weights. Raises UserError."""
    if source.read is None:
        return None
    state = hashlib.blake2b(_text(source.card).encode(), digest_size=16)
    for name, tensor in sorted(source.read().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _text(card: WeightsMetadata) -> str:
    """The metadata as text. A field that came later is left out while it has its default, so that old runs keep their fingerprints."""
    first = [field.name for field in fields(card) if field.default is MISSING] + ["temperature"]
    later = [f.name for f in fields(card) if f.name not in first and getattr(card, f.name) != f.default]
    return f"WeightsMetadata({', '.join(f'{name}={getattr(card, name)!r}' for name in (*first, *later))})"


def _find(family: Family | None, name: str | None, weights: str, network: bool) -> WeightsSource:
    if weights.startswith(_SHIPPED):
        return _from_file(family, name, _shipped(weights.removeprefix(_SHIPPED)), weights)
    path = Path(weights).expanduser()
    kind = _kind(path, weights)
    if kind == "folder":
        return _from_folder(family, name, path)
    if kind == "file":
        return _from_file(family, name, path, str(path))
    if path.suffix in reading.SUFFIXES:
        raise UserError(f"backbone.weights is {weights!r}, and there is no such file{_near(path)}")
    source = _first(families() if family is None else [family], lambda each: each.find_weights(name, weights, network))
    if source is None and weights == DEFAULT:
        raise UserError(f"backbone.weights is {DEFAULT}, and {name} has no weights that come with it; give a file or a folder, or null")
    if source is None:
        others = ", ".join(each.weights_are for each in families() if each.weights_are)
        raise UserError(
            f"backbone.weights is {weights!r}, and no such file or folder exists; weights are a run folder, a folder of save_pretrained, "
            f"a file (.safetensors, .pth, .pt, .bin, .ckpt), {_SHIPPED}NAME with {', '.join(_shipped_names())}, {others}"
        )
    return source


def _kind(path: Path, weights: str) -> str | None:
    """Whether a path is a "file" or a "folder". None where nothing is there. Raises UserError for what is neither, or out of reach."""
    try:
        if path.is_file() or path.is_dir():
            return "file" if path.is_file() else "folder"
        there = path.exists() or path.is_symlink()
    except OSError as error:
        raise UserError(f"backbone.weights is {weights[:200]!r}, which cannot be read: {error.strerror}") from error
    if there:
        raise UserError(f"backbone.weights is {weights!r}, which is neither a file nor a folder, or a link to what is not there")
    return None


def _near(path: Path) -> str:
    """The files of weights that lie where one is looked for in vain."""
    there = sorted(p.name for p in path.parent.glob("*") if p.suffix in reading.SUFFIXES) if path.parent.is_dir() else []
    return f"; in {path.parent} there are {', '.join(there[:6])}" if there else ""


def _from_folder(family: Family | None, name: str | None, folder: Path) -> WeightsSource:
    own = run_dir.weights_file(folder)
    if own.is_file():
        return _from_file(family, name, own, str(own))
    if (folder / foreign.EXPORTED).is_file() and (folder / foreign.DESCRIPTION).is_file():
        return foreign.from_file(family, name, folder / foreign.EXPORTED)
    source = _first(families(), lambda each: each.read_folder(folder))
    if source is not None:
        return source
    if run_dir.recipe_file(folder).is_file():
        raise UserError(f"backbone.weights is the run folder {folder}, which has no weights.safetensors yet; let that run finish first")
    listed = sorted(folder.iterdir())
    if found := [p.name for p in listed if p.is_file() and p.suffix in reading.SUFFIXES]:
        raise UserError(f"backbone.weights is the folder {folder}, in which lie {', '.join(found[:8])}; give the path of one of them")
    if found := [f"{p.name} ({reading.PROGRAMS[p.suffix]})" for p in listed if p.suffix in reading.PROGRAMS]:
        raise UserError(
            f"backbone.weights is the folder {folder}, which holds {', '.join(found[:8])}: a program, not weights by name. "
            "Give the run folder that it was exported from"
        )
    raise UserError(
        f"backbone.weights is the folder {folder}, which has neither weights.safetensors (a run) nor config.json (save_pretrained), "
        "nor any file of weights"
    )


def _first(asked: Iterable[Family], find: Callable[[Family], WeightsSource | None]) -> WeightsSource | None:
    """The weights from the first family that finds them, or None. A family's UserError is raised only if no other family finds them."""
    refused = None
    for family in asked:
        try:
            if (source := find(family)) is not None:
                return source
        except UserError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    return None


def _from_file(family: Family | None, name: str | None, path: Path, origin: str) -> WeightsSource:
    card = read_card(path) if reading.is_safetensors(path) else None
    if card is None:
        return foreign.from_file(family, name, path)
    family = find_family(card.name)
    if family is None:
        raise UserError(f"the weights {origin} are a {card.name}, which no package here provides; install the one they were made with")
    return WeightsSource(family, card, origin, partial(_read, family, path, card))


def _read(family: Family, path: Path, card: WeightsMetadata) -> dict[str, Tensor]:
    return family.converted(read_state(path), card, str(path))


def _unread(family: Family | None, name: str | None, what: str) -> WeightsSource:
    """Weights without metadata, described by the backbone's name alone. Raises UserError where the recipe gives no name."""
    if family is None or name is None:
        raise UserError(f"backbone.name is null, and {what} cannot say which network it is; give a name: {', '.join(names())}")
    return WeightsSource(family, family.default_card(name), what, None)


def _shipped(name: str) -> Path:
    if name not in (known := _shipped_names()):
        raise UserError(f"backbone.weights is '{_SHIPPED}{name}', and no such weights come with tltrain; there are: {', '.join(known)}")
    return _shipped_folder() / f"{name}.safetensors"


def _shipped_names() -> list[str]:
    return sorted(path.stem for path in _shipped_folder().glob("*.safetensors"))


def _shipped_folder() -> Path:
    return Path(str(files("tltrain") / "models" / "shipped"))
