"""Resolves the student that a user names: the backbone, weights that are available locally, and the image size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tltrain.analysis import at_hand
from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone, Data
from tltrain.distilling.teachers import Taught
from tltrain.models import factory
from tltrain.models.families.common import is_convolutional
from tltrain.models.family import family_of, find_family
from tltrain.models.weights import DEFAULT, find

LIBRARIES = ("torchvision:", "timm:")
"""Libraries that are searched for a name without a prefix, in this order."""


@dataclass(frozen=True)
class Student:
    """The network that learns."""

    spec: Backbone
    why: str
    """Why it has these weights."""
    transformer: bool
    """Whether it is not convolutional. Such networks need a smaller learning rate."""
    data: dict[str, Any]
    """The keys size and resize of its recipe's data, where they differ from the teacher's."""
    why_size: str
    parameters: int

    @property
    def pretrained(self) -> bool:
        return self.spec.weights is not None


def student_of(text: str, taught: Taught) -> Student:
    """The student that one word means: NAME, NAME=WEIGHTS, or weights that say what they are. Raises UserError for an unknown one."""
    spec, why = spec_of(text)
    data, why_size = _size(spec, taught)
    outline = factory.skeleton(spec, len(taught.images.classes), data.size, data.resize).chain
    changed = {key: getattr(data, key) for key in ("size", "resize") if getattr(data, key) != getattr(taught.data, key)}
    return Student(spec, why, not is_convolutional(outline.net), changed, why_size, parameters_of(outline))


def parameters_of(chain: Any) -> int:
    """Number of parameters of a network."""
    return sum(parameter.numel() for parameter in chain.net.parameters())


def spec_of(text: str) -> tuple[Backbone, str]:
    """(the backbone, why it has these weights). Downloads nothing. Raises UserError."""
    if find_family(text) is None and Path(text).expanduser().exists():
        return Backbone(weights=text), "as given with --to"
    name, equals, weights = text.partition("=")
    if equals:
        return at_hand.named(f"{_full_name(name) if name else name}={weights}").spec, "as given with --to"
    name = _full_name(text)
    if (file := at_hand.package_file(name)) is not None:
        return Backbone(name=name, weights=str(file)), "of an installed package"
    try:
        find(Backbone(name=name, weights=DEFAULT), network=False)
    except UserError:
        return Backbone(name=name), f"random: {name} has no weights that come with it"
    if (how := at_hand.lacking(name)) is not None:
        return Backbone(name=name), f"random: its own are not on this machine; --to {text}={DEFAULT} fetches them, as does {how}"
    return Backbone(name=name, weights=DEFAULT), "those that its library recommends, which are on this machine"


def _full_name(text: str) -> str:
    """The name with its library: mobilenet_v3_small is torchvision:mobilenet_v3_small. Raises UserError for an unknown name."""
    for name in (text, *(f"{library}{text}" for library in LIBRARIES if ":" not in text)):
        if find_family(name) is not None:
            try:
                find(Backbone(name=name), network=False)
            except UserError:
                if name == text:
                    raise
                continue
            return name
    family_of(text)
    raise UserError(f"--to is {text!r}, and no backbone is called so; `tltrain recipes --backbones QUERY` searches")


def _size(spec: Backbone, taught: Taught) -> tuple[Data, str]:
    """(data settings with the student's image size, the reason). Random weights have no size of their own, and take the teacher's."""
    first = taught.teachers[0]
    if taught.data.size is not None:
        return taught.data, f"as in {first.path.name}"
    if spec.weights is not None:
        return taught.data, ""
    card = first.card
    return taught.data.model_copy(update={"size": card.size, "resize": card.resize}), f"that of {first.path.name}: random weights have none"
