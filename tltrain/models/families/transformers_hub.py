"""The hf family: every image classifier and backbone of transformers (`hf:ORG/REPO`), from the hub or a folder of save_pretrained.

transformers is slow to import, so what needs it is imported when a method runs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tltrain.core.errors import UserError
from tltrain.models.chain import Block
from tltrain.models.families.common import is_convolutional
from tltrain.models.family import Family, WeightsSource
from tltrain.models.metadata import WeightsMetadata, checked
from tltrain.models.tracing import CannotCut, grouped_blocks, traced_blocks
from tltrain.models.tracing.structure import HEAD, STEM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "hf:"
ANY = f"{PREFIX}ORG/REPO"
_REPO = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)
_HALF = (0.5, 0.5, 0.5)
_SIDE = 224
_CHANNELS_LAST = (0, 2, 3, 1)
"""A network that turns features so itself (ConvNeXt) gets images so. Else its convolutions answer in one layout or another."""


class TransformersFamily(Family):
    """Every network of transformers that classifies images, or whose pooled output a classifier can be put on."""

    weights_are = "for a network of transformers a hub id like facebook/dinov2-small"

    def matches(self, name: str) -> bool:
        return name.startswith(PREFIX)

    def describe(self) -> dict[str, str]:
        return {ANY: "any image classifier or backbone of transformers on the hub, such as hf:facebook/dinov2-small"}

    def all_names(self) -> Collection[str]:
        return ()  # those on the hub are not known here

    def named_on_hub(self, repo: str) -> str | None:
        return PREFIX + repo

    def default_card(self, name: str) -> WeightsMetadata:
        """The metadata of a hub repository, of which only the configuration is fetched."""
        repo = name.removeprefix(PREFIX)
        if not _REPO.fullmatch(repo):
            raise UserError(
                f"backbone.name {name} takes its configuration from weights, and these have none; name a repository, like {ANY}"
            )
        from tltrain.models import hf_hub

        card, _ = _described(hf_hub.download(repo, network=True, weights=False), name)
        return replace(card, classes=None)

    def default_weights(self, name: str) -> str | None:
        repo = name.removeprefix(PREFIX)
        return repo if _REPO.fullmatch(repo) else None

    def head_of(self, card: WeightsMetadata) -> str:
        return self.heads_of(card)[0]

    def heads_of(self, card: WeightsMetadata) -> tuple[str, ...]:
        from tltrain.models.transformers import networks

        return networks.heads_of(card.config, card.name)

    def build(self, card: WeightsMetadata, num_classes: int) -> nn.Module:
        from tltrain.models.transformers import networks

        return networks.build(card.config, num_classes, card.name)

    def blocks(self, net: nn.Module, card: WeightsMetadata, dropout: float) -> list[Block]:
        """stem, the elements of the repeated containers under names such as layer.3 or stages.1.layers.0, head."""
        heads = self.heads_of(card)
        faster = ("cuda",) if is_convolutional(net) else ()
        try:
            if len(heads) > 1:
                raise CannotCut(f"it has {len(heads)} classifiers, and answers with their mean")
            found = traced_blocks(net, heads[0], dropout, card.size, with_values=True, channels_last=faster)
        except CannotCut as why:
            return _shortly_named(_whole(net, heads, str(why)))
        if any(block.input_order == _CHANNELS_LAST for block in found):
            found = [replace(block, channels_last=("cpu", "cuda")) for block in found]
        return _shortly_named(found)

    def fitted(self, card: WeightsMetadata, size: int, classes: tuple[str, ...] | None) -> WeightsMetadata:
        """As in `Family`. Raises UserError for a size that the network cannot take, and for a network without one linear classifier."""
        from tltrain.models.transformers import configs, states

        self.heads_of(card)
        values = configs.with_side(card.config, size)
        if size != configs.side_of(configs.made(card.config, card.name)):
            states.check_side(card.config, size, card.name)
        if classes is not None:
            values = configs.with_classes(values, classes)
        return replace(card, config=values, size=size, classes=classes)

    def resized(self, state: Mapping[str, Tensor], card: WeightsMetadata, size: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Interpolate position embeddings once, in the weights."""
        from tltrain.models.transformers import configs, states

        if size == configs.side_of(configs.made(card.config, card.name)):
            return dict(state), ()
        return states.resized(state, card.config, size, card.name)

    def mismatch(self, name: str, card: WeightsMetadata) -> str | None:
        """A repository's name is also that of a folder of the same configuration; `hf:TYPE` is that of all networks of this type."""
        if not self.matches(card.name):
            return super().mismatch(name, card)
        kind = f"{PREFIX}{card.config.get('model_type')}"
        return None if name in (card.name, kind) else f"are a {card.name}; set the name to {kind} or null"

    def find_weights(self, name: str | None, weights: str, network: bool) -> WeightsSource | None:
        """Find weights by their hub id, in the hub's cache or by download; without `network` only the configuration. Raises UserError."""
        if not _REPO.fullmatch(weights):
            return None
        from tltrain.models import hf_hub

        folder = hf_hub.download(weights, network=True, weights=network)
        if name is None and hf_hub.is_vit(folder):
            return None
        return self._pretrained(folder, f"{PREFIX}{weights}", f"hub {weights} at revision {folder.name[:12]}", read=network)

    def read_folder(self, folder: Path) -> WeightsSource | None:
        """Find weights in a folder written by save_pretrained. Plain ViTs have a family of their own. Raises UserError."""
        if not (folder / "config.json").is_file():
            return None
        from tltrain.models import hf_hub

        return None if hf_hub.is_vit(folder) else self._pretrained(folder, None, str(folder), read=True)

    def _pretrained(self, folder: Path, name: str | None, origin: str, read: bool) -> WeightsSource:
        from tltrain.models.transformers import states

        card, notes = _described(folder, name)
        if not read:
            return WeightsSource(self, card, origin, None, notes)
        state = states.from_folder(folder, card.config)
        return WeightsSource(self, card, origin, partial(dict, state.tensors), (*notes, *state.notes))

    def converted(self, state: dict[str, Tensor], card: WeightsMetadata, origin: str) -> dict[str, Tensor]:
        """Convert through transformers, unless the names are the network's own. Raises UserError."""
        from tltrain.models.transformers import states

        heads = tuple(f"{head}." for head in self.heads_of(card))
        if {name for name in states.shapes(card.config, card.name) if not name.startswith(heads)} <= set(state):
            return state
        return states.from_tensors(state, card.config, origin).tensors

    def to_transformers(self, net: nn.Module, card: WeightsMetadata) -> PreTrainedModel | None:
        from transformers import PreTrainedModel

        return net if isinstance(net, PreTrainedModel) else None


FAMILY = TransformersFamily()


def _described(folder: Path, name: str | None) -> tuple[WeightsMetadata, tuple[str, ...]]:
    """(the metadata of a folder, lines for the user on what is assumed or done otherwise). Raises UserError."""
    from tltrain.models.transformers import configs, processors

    config = configs.read(folder)
    side = configs.side_of(config)
    size = side or _SIDE
    values = configs.with_side(configs.plain(config), size)
    classes = configs.classes_of(config, str(folder / configs.CONFIG))
    card = WeightsMetadata(name or f"{PREFIX}{config.model_type}", values, _HALF, _HALF, size, size, "bilinear", classes)
    if (folder / processors.PROCESSOR).exists():
        card, notes = processors.with_processor(card, folder, config)
        return checked(card, str(folder / processors.PROCESSOR)), notes
    whose = "the configuration's" if side else "assumed"
    note = f"it has no {processors.PROCESSOR}: mean and std are 0.5, the size is {whose}, {size}"
    return checked(card, str(folder / configs.CONFIG)), (note,)


def _whole(net: nn.Module, heads: tuple[str, ...], why: str) -> list[Block]:
    """Blocks without steps, of which the last is all classifiers."""
    *body, head = grouped_blocks(net, heads[0], why)
    return [*(replace(block, owns=tuple(path for path in block.owns if path not in heads)) for block in body), replace(head, owns=heads)]


def _shortly_named(blocks: Sequence[Block]) -> list[Block]:
    """The same blocks without what all their names begin with: `layer.3` for `dinov2.encoder.layer.3`."""
    paths = [block.name.split(".") for block in blocks if block.name not in (STEM, HEAD)]
    common = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))) if len(paths) > 1 else 0
    if any(len(path) <= common or path[common].isdigit() for path in paths):
        common -= 1  # a name begins with a word
    return [
        block if block.name in (STEM, HEAD) else replace(block, name=".".join(block.name.split(".")[max(0, common) :])) for block in blocks
    ]
