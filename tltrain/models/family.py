"""The Family protocol: the interface of a network architecture, such as ResNet or ViT. Families are registered by name."""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
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
    """A family of networks. A subclass must define the abstract methods. The rest has defaults.

    Its module is imported for every lookup of a name. So import large packages other than torch and torchvision inside the methods.
    """

    blocks_are_tested: bool = False
    """Whether tests hold the blocks of all of its networks against the networks. Else that is done for each that is loaded."""
    weights_are: str = ""
    """Other forms of `backbone.weights` than files and folders, for error messages: `for a torchvision ResNet a weights name`."""

    @abstractmethod
    def matches(self, name: str) -> bool:
        """Whether a name, from `backbone.name` or from metadata, belongs to this family."""
        ...

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Maps each name to a one-line description, for `tltrain recipes --backbones` and for suggestions."""
        ...

    def search(self, words: str) -> dict[str, str]:
        """As `describe`, of the networks whose names hold `words`, in lower case. A family of many describes only kinds of them there."""
        return {name: line for name, line in self.describe().items() if words in name.lower()}

    def all_names(self) -> Collection[str]:
        """The names of all networks, for suggestions. Empty where the library that has them is not installed."""
        return self.describe()

    def named_on_hub(self, repo: str) -> str | None:
        """The name here of a repository ORG/REPO of the Hugging Face hub, for suggestions. None where this family has none for it."""
        return None

    @abstractmethod
    def default_card(self, name: str) -> WeightsMetadata:
        """Metadata for random weights and for files without any. Raises UserError for a name that only weights can define."""
        ...

    @abstractmethod
    def head_of(self, card: WeightsMetadata) -> str:
        """Path of the linear classifier in the net that `build` makes of this card. The last block, named `head`, is this module alone."""
        ...

    def heads_of(self, card: WeightsMetadata) -> tuple[str, ...]:
        """Paths of all classifiers, for a net that takes the mean of several, as distilled ones do. The last block owns them."""
        return (self.head_of(card),)

    @abstractmethod
    def build(self, card: WeightsMetadata, num_classes: int) -> nn.Module:
        """Build the net with random weights on the current default device.

        The net maps normalised images (B, 3, size, size) to logits (B, num_classes). Where its blocks have no steps, it may return an
        object with an attribute `logits` instead, as transformers' networks do.
        """
        ...

    @abstractmethod
    def blocks(self, net: nn.Module, card: WeightsMetadata, dropout: float) -> list[Block]:
        """The blocks of a net, the head last (`families.common.head_block`). Where any has no step, the net runs as a whole (`Chain`).

        net, card: the net that `build` made of this card. On the meta device for a plan.
        dropout: probability for the input of the head, applied in the head's step. For a net that runs as a whole the caller adds it.
        """
        ...

    def fitted(self, card: WeightsMetadata, size: int, classes: tuple[str, ...] | None) -> WeightsMetadata:
        """Metadata of the same net for images of `size` pixels and these classes. Raises UserError for an unsupported size."""
        return replace(card, size=size, classes=classes)

    def resized(self, state: Mapping[str, Tensor], card: WeightsMetadata, size: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Adapt a state dict to images of `size` pixels. Returns (the state dict, lines for the user on what was changed).

        The default changes nothing, since convolutions take every size.
        """
        return dict(state), ()

    def mismatch(self, name: str, card: WeightsMetadata) -> str | None:
        """None if weights with this metadata are for the network `name`. Otherwise the rest of an error `the weights X …`."""
        return None if name == card.name else f"are a {card.name}; set the name to {card.name} or null"

    def weights_in(self, name: str) -> str | None:
        """The `backbone.weights` that a name itself gives, such as the tag in timm:ARCH.TAG. They are taken where the recipe gives none."""
        return None

    def default_weights(self, name: str) -> str | None:
        """The `backbone.weights` that DEFAULT means for a network of this family. None leaves DEFAULT to `find_weights`."""
        return None

    def find_weights(self, name: str | None, weights: str, network: bool) -> WeightsSource | None:
        """Find weights given by name, such as a hub id. Returns None where this family has no weights of that name.

        name: one of this family's, or None where the recipe gives none.
        network: whether to download. Raises UserError.
        """
        return None

    def read_folder(self, folder: Path) -> WeightsSource | None:
        """Find weights in a folder written by another program. Returns None where this family cannot read it. Raises UserError."""
        return None

    def converted(self, state: dict[str, Tensor], card: WeightsMetadata, origin: str) -> dict[str, Tensor]:
        """Rename the tensors of a file of weights to the net's names. `origin` names the file in messages. Raises UserError."""
        return state

    def to_transformers(self, net: nn.Module, card: WeightsMetadata) -> PreTrainedModel | None:
        """The same network as a transformers model, for an export. None where transformers has no such class."""
        return None

    def torchvision_name(self, card: WeightsMetadata) -> str | None:
        """Name of the torchvision model that loads the same state dict. None where torchvision has no such model."""
        return None


@dataclass(frozen=True)
class WeightsSource:
    """Weights that were found. The metadata is read already. The tensors are read by calling `read`."""

    family: Family
    card: WeightsMetadata
    """Metadata of the weights. `classes` is None where they have no head, or where its classes are unknown."""
    origin: str
    read: Callable[[], dict[str, Tensor]] | None
    """Returns the tensors under the net's names, without a head where the weights have none. None for random weights."""
    notes: tuple[str, ...] = ()


def families() -> Iterator[Family]:
    """Yields all families, the built-in ones first. Each is imported when it is reached. Raises UserError if an import fails."""
    for name in registry.names("families"):
        family: Family = registry.find("families", name, f"the family of backbones {name!r} is asked for")
        yield family


def find_family(name: str) -> Family | None:
    """The family that a name belongs to, or None."""
    return next((family for family in families() if family.matches(name)), None)


def names() -> dict[str, str]:
    """Maps the name of each backbone to a one-line description."""
    return {name: line for family in families() for name, line in family.describe().items()}


def family_of(name: str) -> Family:
    """The family of a `backbone.name`. Raises UserError for an unknown name, with the closest known ones."""
    family = find_family(name)
    if family is None:
        if os.path.isfile(name) or ("/" in name and os.path.exists(name)):
            raise UserError(f"backbone.name is {name!r}, which is a path here; give it as backbone.weights, with backbone.name null")
        near = nearest(name)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the backbones: {', '.join(names())};"
        raise UserError(f"backbone.name is {name!r}; {hint} `tltrain recipes --backbones QUERY` searches all that is installed")
    return family


def search(words: str) -> dict[str, str]:
    """Maps the name of each installed network that holds `words` to a one-line description. Raises UserError where none does."""
    found = {name: line for family in families() for name, line in family.search(words.lower()).items()}
    if not found:
        near = nearest(words)
        hint = f"did you mean {' or '.join(near)}?" if near else "`tltrain recipes --backbones` lists the kinds"
        raise UserError(f"no network that is installed is called {words!r} or holds that in its name; {hint}")
    return found


def nearest(name: str) -> list[str]:
    """Up to three names that this one may mean, whatever its case and whichever library it names. Those of that library stand first,
    else those without one.

    A hub id, with or without the hub's name before it, is the name that a family has for it.
    """
    repo = re.fullmatch(r"(?:(?:hf|hf[-_]hub|huggingface):)?(\w[\w.-]*/[\w.-]+)", name, re.ASCII | re.IGNORECASE)
    if repo is not None and (hub := [own for family in families() if (own := family.named_on_hub(repo[1])) is not None]):
        return hub[:1]
    known: dict[str, list[str]] = {}
    for family in families():
        for full in family.all_names():
            known.setdefault(_folded(full.rpartition(":")[2]), []).append(full)
    library, tail = _parted(name, {full.partition(":")[0] for some in known.values() for full in some if ":" in full})
    stem = tail.partition(".")[0]  # without a tag of timm's
    words = [word for word in tail.split("_") if len(word) > 1]
    near = [stem] if stem in known else []
    if not near and len(words) > 1:  # dinov2-small for vit_small_patch14_dinov2
        near = sorted((other for other in known if all(word in other for word in words)), key=len)
    near = near or get_close_matches(tail, known, n=3, cutoff=0.7)
    meant = [full for other in near for full in known[other]]
    return sorted(meant, key=lambda full: full.partition(":")[0] != library if library else ":" in full)[:3]


def _parted(name: str, libraries: Collection[str]) -> tuple[str | None, str]:
    """Returns (the library that a name says it is of, however it is spelled, or None; the rest of the name, folded)."""
    head, _, rest = re.sub(r"[:/.]", ":", name, count=1).partition(":")
    meant = get_close_matches(head.strip().lower(), libraries, n=1, cutoff=0.8) if rest else []
    return (meant[0], _folded(rest)) if meant else (None, _folded(name.rpartition(":")[2]))


def _folded(name: str) -> str:
    """A name without what people spell one way and another: case, and dashes for underscores."""
    return name.strip().lower().replace("-", "_")
