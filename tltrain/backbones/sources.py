"""What `backbone.weights` may be, and the reading of each kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from torch import Tensor

from tltrain import recipe
from tltrain.backbones import hub, resnet, torch_hub, vit
from tltrain.backbones.card import Card, read_card, read_state
from tltrain.errors import UserError


@dataclass(frozen=True)
class Source:
    """Weights found, their description read, their tensors not yet."""

    card: Card
    """Of the weights as they are; classes is None where they hold no head, or do not say what it knows."""
    origin: str
    read: Callable[[], dict[str, Tensor]] | None
    """The tensors under the net's own names (without the head where there is none); None for random weights."""
    notes: tuple[str, ...] = ()


def names() -> dict[str, str]:
    return {**resnet.names(), **vit.names()}


def family(name: str) -> ModuleType:
    """The module that knows a backbone's family. Raises UserError."""
    if name in resnet.TORCHVISION or name in resnet.SMALL:
        return resnet
    if name in vit.SIZES or name == vit.ANY:
        return vit
    known = [*resnet.TORCHVISION, *resnet.SMALL, *vit.SIZES, vit.ANY]
    near = get_close_matches(name, known, n=1)
    raise UserError(f"backbone.name is {name!r}; " + (f"did you mean {near[0]}?" if near else f"the backbones: {', '.join(known)}"))


def find(spec: recipe.Backbone, *, network: bool) -> Source:
    """Where the weights of a recipe's backbone are, and what they are. Without network, nothing is downloaded. Raises UserError."""
    name, weights = spec.name, spec.weights
    if name is not None:
        family(name)
    if weights is None:
        return Source(_default_card(name, "random weights"), "random weights", None)
    source = _find(name, weights, network)
    if name is not None:
        _check_name(name, source)
    return source


def _find(name: str | None, weights: str, network: bool) -> Source:
    if weights.startswith("shipped:"):
        return _from_file(name, _shipped(weights.removeprefix("shipped:")), weights)
    path = Path(weights).expanduser()
    if path.is_dir():
        return _from_folder(name, path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"backbone.weights is {weights!r}, and there is no such file")
        return _from_file(name, path, str(path))
    if name in resnet.TORCHVISION:
        entry = torch_hub.find(name, weights)
        return Source(torch_hub.card_of(name, entry), f"torchvision's {entry}", partial(torch_hub.read_state, entry))
    if name in resnet.SMALL or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", weights, re.ASCII):
        raise UserError(
            f"backbone.weights is {weights!r}, and no such folder exists; weights are a folder of save_pretrained, a run folder, "
            "a .safetensors file, for a ViT a hub id like google/vit-base-patch16-224-in21k, for a torchvision ResNet a weights name"
        )
    try:
        folder = hub.download(weights, network=network)
    except UserError:
        if network or name is None or name == vit.ANY:
            raise
        note = "it is not in the hub's cache: size, mean and std are assumed from the name"
        return Source(_default_card(name, weights), f"hub {weights}", None, (note,))
    return _from_pretrained(folder, f"hub {weights} at revision {folder.name[:12]}")


def _from_folder(name: str | None, folder: Path) -> Source:
    own = folder / "weights.safetensors"
    if own.is_file():
        return _from_file(name, own, str(own))
    if (folder / "config.json").is_file():
        return _from_pretrained(folder, str(folder))
    if (folder / "recipe.yaml").is_file():
        raise UserError(f"backbone.weights is the run folder {folder}, which has no weights.safetensors yet; let that run finish first")
    raise UserError(
        f"backbone.weights is the folder {folder}, which has neither weights.safetensors (a run) nor config.json (save_pretrained)"
    )


def _from_pretrained(folder: Path, origin: str) -> Source:
    card, notes = hub.read_card(folder)
    return Source(card, origin, partial(hub.read_state, folder), notes)


def _from_file(name: str | None, path: Path, origin: str) -> Source:
    card = read_card(path)
    notes: tuple[str, ...] = ()
    if card is None:
        card = _default_card(name, f"{path}, a file without a card of ours,")
        notes = (f"the file says nothing of itself: size, mean and std are assumed from the name {name}",)
    if family(card.name) is vit:  # through transformers, which also knows the names of its earlier versions
        return Source(card, origin, partial(_read_vit, path, card), notes)
    return Source(card, origin, partial(read_state, path), notes)


def _read_vit(path: Path, card: Card) -> dict[str, Tensor]:
    return hub.convert(read_state(path), card, str(path))


def _default_card(name: str | None, what: str) -> Card:
    if name is None:
        raise UserError(f"backbone.name is null, and {what} cannot say which network it is; give a name: {', '.join(names())}")
    return family(name).default_card(name)


def _check_name(name: str, source: Source) -> None:
    card = source.card
    if family(name) is not family(card.name) or (family(name) is resnet and name != card.name):
        raise UserError(f"backbone.name is {name}, and the weights {source.origin} are a {card.name}; set the name to {card.name} or null")
    if family(name) is vit and (wrong := vit.differences(name, card.config)):
        raise UserError(
            f"backbone.name is {name}, and the weights {source.origin} have {', '.join(wrong)}; set the name to {vit.ANY} or null"
        )


def _shipped(name: str) -> Path:
    folder = Path(str(files("tltrain") / "backbones" / "shipped"))
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "none"
        raise UserError(f"backbone.weights is 'shipped:{name}', and no such weights come with tltrain; there are: {known}")
    return path
