"""The Family protocol: everything tltrain needs to know about a family of networks. Families are registered by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.models.chain import Block
from tltrain.models.metadata import WeightsMetadata

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Family(Protocol):
    """A family of networks. A subclass need only say what has no default here.

    Its module is imported whenever a name is looked up. What is heavy beyond torch and torchvision is imported inside the methods.
    """

    head: str
    """Path of the linear classifier in a net. It is all that the last block, named `head`, owns."""
    weights_are: str = ""
    """What `backbone.weights` may be beside files and folders, for a message: `for a torchvision ResNet a weights name`."""

    @abstractmethod
    def matches(self, name: str) -> bool:
        """Whether `backbone.name`, or the name in a card, is one of this family's."""
        ...

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Name to a one-line description, for `tltrain recipes --backbones` and for suggestions."""
        ...

    @abstractmethod
    def default_card(self, name: str) -> WeightsMetadata:
        """What holds for a network whose weights say nothing of themselves. Raises UserError where only weights could say it."""
        ...

    @abstractmethod
    def build(self, card: WeightsMetadata, num_classes: int) -> nn.Module:
        """The net on the current default device, with random weights: normalised images (B, 3, size, size) to logits (B, num_classes).

        A net whose blocks have no steps may return an object that has the logits as `logits`, as transformers' networks do.
        """
        ...

    @abstractmethod
    def blocks(self, net: nn.Module, dropout: float) -> list[Block]:
        """The blocks of a net, the head last (`steps.head_block`). Where any has no step, the net runs whole (`Chain`).

        dropout: of what enters the head, in the head's own step; in a net that runs whole it is added to it.
        """
        ...

    def fitted(self, card: WeightsMetadata, size: int, classes: tuple[str, ...] | None) -> WeightsMetadata:
        """The card of the same net for images of `size` pixels and these classes. Raises UserError for a size that does not fit."""
        return replace(card, size=size, classes=classes)

    def resized(self, state: Mapping[str, Tensor], card: WeightsMetadata, size: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """(the state dict of `card` for images of `size` pixels, lines that say what was done). Convolutions take every size."""
        return dict(state), ()

    def mismatch(self, name: str, card: WeightsMetadata) -> str | None:
        """Why weights with this card are not the network `name`: what follows on `the weights X`, with the remedy."""
        return None if name == card.name else f"are a {card.name}; set the name to {card.name} or null"

    def find_weights(self, name: str | None, weights: str, network: bool) -> Source | None:
        """Weights that are no file and no folder, such as a hub id; None where this family knows no such weights.

        name: one of this family's, or None where the recipe gives none. Without network, nothing is downloaded. Raises UserError.
        """
        return None

    def read_folder(self, folder: Path) -> Source | None:
        """Weights in a folder of another program's, or None where this family cannot read it. Raises UserError."""
        return None

    def converted(self, state: dict[str, Tensor], card: WeightsMetadata, origin: str) -> dict[str, Tensor]:
        """The tensors of a .safetensors file, under the net's own names. origin: of the file, for a message. Raises UserError."""
        return state

    def to_transformers(self, net: nn.Module, card: WeightsMetadata) -> PreTrainedModel | None:
        """The same network as a class of transformers, for an export; None where transformers has none."""
        return None

    def torchvision_name(self, card: WeightsMetadata) -> str | None:
        """The name by which torchvision builds a net that loads the same state dict; None where it has none."""
        return None


@dataclass(frozen=True)
class Source:
    """Weights found, their description read, their tensors not yet."""

    family: Family
    card: WeightsMetadata
    """Of the weights as they are; classes is None where they hold no head, or do not say what it knows."""
    origin: str
    read: Callable[[], dict[str, Tensor]] | None
    """The tensors under the net's own names (without the head where there is none); None for random weights."""
    notes: tuple[str, ...] = ()


def families() -> Iterator[Family]:
    """All families, ours first, each imported as it is reached. Raises UserError for one of another package that cannot be imported."""
    for name in registry.names("families"):
        family: Family = registry.find("families", name, f"the family of backbones {name!r} is asked for")
        yield family


def find_family(name: str) -> Family | None:
    """The family that a name belongs to."""
    return next((family for family in families() if family.matches(name)), None)


def names() -> dict[str, str]:
    """Name of each backbone to a one-line description."""
    return {name: line for family in families() for name, line in family.describe().items()}


def family_of(name: str) -> Family:
    """The family of `backbone.name`. Raises UserError for an unknown name, with the nearest known one."""
    family = find_family(name)
    if family is None:
        known = names()
        near = get_close_matches(name, known, n=1)
        raise UserError(f"backbone.name is {name!r}; " + (f"did you mean {near[0]}?" if near else f"the backbones: {', '.join(known)}"))
    return family
