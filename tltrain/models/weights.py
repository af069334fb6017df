"""Finds and reads the weights of `backbone.weights`: shipped, a file, a run folder, a hub id or a torchvision name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from tltrain.core import recipe
from tltrain.core.errors import UserError
from tltrain.models.family import Family, WeightsSource, families, family_of, find_family, names
from tltrain.models.metadata import WeightsMetadata, read_card, read_state
from tltrain.runs import run_dir


def find(spec: recipe.Backbone, *, network: bool) -> WeightsSource:
    """Find the weights of a recipe's backbone and read their metadata. Downloads only with `network`. Raises UserError."""
    family = None if spec.name is None else family_of(spec.name)
    if spec.weights is None:
        return _unread(family, spec.name, "random weights")
    source = _find(family, spec.name, spec.weights, network)
    if family is not None and spec.name is not None and (why := family.mismatch(spec.name, source.card)) is not None:
        raise UserError(f"backbone.name is {spec.name}, and the weights {source.origin} {why}")
    return source


def fingerprint(spec: recipe.Backbone) -> str | None:
    """Hash of a recipe's weights and their metadata. None for random weights. Raises UserError."""
    source = find(spec, network=True)
    if source.read is None:
        return None
    state = hashlib.blake2b(repr(source.card).encode(), digest_size=16)
    for name, tensor in sorted(source.read().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _find(family: Family | None, name: str | None, weights: str, network: bool) -> WeightsSource:
    if weights.startswith("shipped:"):
        return _from_file(family, name, _shipped(weights.removeprefix("shipped:")), weights)
    path = Path(weights).expanduser()
    if path.is_dir():
        return _from_folder(family, name, path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"backbone.weights is {weights!r}, and there is no such file")
        return _from_file(family, name, path, str(path))
    if path.is_file():
        raise UserError(
            f"backbone.weights is the file {weights!r}, which is no .safetensors file. Others may run code when they are loaded, so they "
            "are not; convert it with safetensors.torch.save_file, or give the folder that it lies in"
        )
    source = _first(families() if family is None else [family], lambda each: each.find_weights(name, weights, network))
    if source is None:
        others = ", ".join(each.weights_are for each in families() if each.weights_are)
        raise UserError(
            f"backbone.weights is {weights!r}, and no such folder exists; weights are a folder of save_pretrained, a run folder, "
            f"a .safetensors file, {others}"
        )
    return source


def _from_folder(family: Family | None, name: str | None, folder: Path) -> WeightsSource:
    own = run_dir.weights_file(folder)
    if own.is_file():
        return _from_file(family, name, own, str(own))
    source = _first(families(), lambda each: each.read_folder(folder))
    if source is not None:
        return source
    if run_dir.recipe_file(folder).is_file():
        raise UserError(f"backbone.weights is the run folder {folder}, which has no weights.safetensors yet; let that run finish first")
    raise UserError(
        f"backbone.weights is the folder {folder}, which has neither weights.safetensors (a run) nor config.json (save_pretrained)"
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
    card = read_card(path)
    if card is None:
        source = _unread(family, name, f"{path}, a file without a card of ours,")
        family, card = source.family, source.card
        notes: tuple[str, ...] = (f"the file says nothing of itself: size, mean and std are assumed from the name {name}",)
    else:
        family, notes = find_family(card.name), ()
        if family is None:
            raise UserError(f"the weights {origin} are a {card.name}, which no package here provides; install the one they were made with")
    return WeightsSource(family, card, origin, partial(_read, family, path, card), notes)


def _read(family: Family, path: Path, card: WeightsMetadata) -> dict[str, Tensor]:
    return family.converted(read_state(path), card, str(path))


def _unread(family: Family | None, name: str | None, what: str) -> WeightsSource:
    """Weights without metadata, described by the backbone's name alone. Raises UserError where the recipe gives no name."""
    if family is None or name is None:
        raise UserError(f"backbone.name is null, and {what} cannot say which network it is; give a name: {', '.join(names())}")
    return WeightsSource(family, family.default_card(name), what, None)


def _shipped(name: str) -> Path:
    folder = Path(str(files("tltrain") / "models" / "shipped"))
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "none"
        raise UserError(f"backbone.weights is 'shipped:{name}', and no such weights come with tltrain; there are: {known}")
    return path
