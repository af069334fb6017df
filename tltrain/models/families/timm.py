"""The timm family: every network of timm (`timm:ARCH` or `timm:ARCH.TAG`), cut where one tensor lives."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tltrain.core.errors import UserError
from tltrain.models import foreign
from tltrain.models.chain import Block
from tltrain.models.families.common import is_convolutional
from tltrain.models.family import Family, WeightsSource
from tltrain.models.metadata import WeightsMetadata, checked
from tltrain.models.timm import hub, layers, networks, search
from tltrain.models.timm.networks import PREFIX
from tltrain.models.tracing import CannotCut, grouped_blocks, traced_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ANY = f"{PREFIX}ARCHITECTURE"


class TimmFamily(Family):
    """Every network of timm that has a classifier."""

    weights_are = f"for a timm network a tag of its weights, or DEFAULT, or {hub.HUB}ID"

    def matches(self, name: str) -> bool:
        return name.startswith(PREFIX)

    def describe(self) -> dict[str, str]:
        return {ANY: "any network of timm (pip install 'tltrain[timm]'): `tltrain recipes --backbones QUERY` searches them"}

    def search(self, words: str) -> dict[str, str]:
        return search.found(words)

    def all_names(self) -> Collection[str]:
        return search.names()

    def named_on_hub(self, repo: str) -> str | None:
        """timm's own repositories, timm/ARCHITECTURE.TAG, hold the weights that the tag means."""
        organisation, _, name = repo.partition("/")
        return PREFIX + name if organisation.lower() == "timm" else None

    def default_card(self, name: str) -> WeightsMetadata:
        networks.check(name)
        architecture, tag = networks.split(name)
        config = networks.library().models.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
        if config is None:
            raise UserError(f"timm does not say which images {name} takes; name another network")
        return networks.card_of(name, config.to_dict(), None)

    def head_of(self, card: WeightsMetadata) -> str:
        return networks.heads(card)[0]

    def heads_of(self, card: WeightsMetadata) -> tuple[str, ...]:
        return networks.heads(card)

    def build(self, card: WeightsMetadata, num_classes: int) -> nn.Module:
        return networks.build(card, num_classes)

    def blocks(self, net: nn.Module, card: WeightsMetadata, dropout: float) -> list[Block]:
        """Blocks of the traced network, or timm's own layers without steps where tracing fails."""
        heads = networks.heads(card)
        faster = ("cuda",) if is_convolutional(net) else ()
        try:
            if len(heads) > 1:
                raise CannotCut(f"it has {len(heads)} classifiers")
            functions, modules = networks.leaves()
            found = traced_blocks(net, heads[0], dropout, card.size, leaf_functions=functions, leaf_modules=modules, channels_last=faster)
        except CannotCut as why:
            found = [*grouped_blocks(net, heads[0], str(why), layers.groups(net, heads))]
            found[-1] = replace(found[-1], owns=heads)
        return layers.with_distances(net, found)

    def fitted(self, card: WeightsMetadata, size: int, classes: tuple[str, ...] | None) -> WeightsMetadata:
        """As in `Family`. Raises UserError for a size that patches or windows do not divide."""
        self.head_of(card)
        if size != card.size:
            networks.check_size(replace(card, size=size))
        return replace(card, size=size, classes=classes)

    def resized(self, state: Mapping[str, Tensor], card: WeightsMetadata, size: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """As timm adapts weights of another size: position embeddings and the like are resampled once, in the weights."""
        with torch.device("meta"):
            want = self.build(replace(card, size=size), 2).state_dict()
        heads = _prefixes(card)
        changed = [n for n, t in state.items() if not n.startswith(heads) and n in want and t.shape != want[n].shape]
        if not changed:
            return dict(state), ()
        found = _through_timm(dict(state), replace(card, size=size), "of another size")
        return found, (f"timm resampled {', '.join(changed[:3])}{' and more' * (len(changed) > 3)} from {card.size} to {size} px",)

    def mismatch(self, name: str, card: WeightsMetadata) -> str | None:
        architecture = PREFIX + networks.split(name)[0]
        return super().mismatch(architecture, card)

    def weights_in(self, name: str) -> str | None:
        return networks.split(name)[1]

    def find_weights(self, name: str | None, weights: str, network: bool) -> WeightsSource | None:
        """Find weights by their tag in timm, by DEFAULT, or by hf-hub:ID. Raises UserError."""
        if weights.startswith(hub.HUB):
            config = hub.fetch_config(weights.removeprefix(hub.HUB), network=network)
            name = f"{PREFIX}{config['architecture']}"
        elif name is None or not self.matches(name):
            return None
        else:
            architecture, tag = networks.split(name)
            networks.check(name)
            config = hub.entry(architecture, tag if weights == "DEFAULT" and tag else weights)
        card = networks.card_of(name, config, hub.classes_of(config))
        if weights.startswith(hub.HUB) and config.get("model_args"):
            card = replace(card, config={**card.config, "model_args": config["model_args"]})
        notes = networks.notes_on(config)
        return WeightsSource(self, card, hub.where(config), partial(_read, self, config, card), notes)

    def read_folder(self, folder: Path) -> WeightsSource | None:
        """Find a network in a folder as timm's hub has it, or as transformers wraps it, such as an export of ours. Raises UserError."""
        if not (folder / hub.CONFIG).is_file() or (found := hub.read_folder(folder)) is None:
            return None
        config, path = found
        try:
            card = networks.card_of(f"{PREFIX}{config['architecture']}", config, hub.classes_of(config))
            notes = networks.notes_on(config)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{folder / hub.CONFIG} does not describe a network as timm does ({error!r}); get the folder anew") from error
        if config.get("model_args"):
            card = replace(card, config={**card.config, "model_args": config["model_args"]})
        return foreign.from_described_file(self, checked(card, str(folder / hub.CONFIG)), path, notes)

    def converted(self, state: dict[str, Tensor], card: WeightsMetadata, origin: str) -> dict[str, Tensor]:
        """Names of the architecture's first authors become timm's, as timm does it. Names that fit, or that nobody knows, stay."""
        with torch.device("meta"):
            want = set(self.build(card, 2).state_dict())
        if {n for n in want if not n.startswith(_prefixes(card))} <= set(state):
            return state
        try:
            return _through_timm(state, card, origin)
        except UserError:
            return state  # the caller says what is missing, by name

    def to_transformers(self, net: nn.Module, card: WeightsMetadata) -> PreTrainedModel | None:
        """transformers' wrapper of the same network. It needs timm where it is used, too."""
        from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

        said = networks.export_config(card)
        own: Any = {key: said[key] for key in ("architecture", "model_args", "pretrained_cfg")}
        config = TimmWrapperConfig(**own, num_labels=said["num_classes"])  # type: ignore[call-arg]  # of every PreTrainedConfig
        with torch.random.fork_rng(devices=[]):
            model = TimmWrapperForImageClassification(config).eval()
        model.timm_model.load_state_dict(net.state_dict(), strict=True)
        return model


FAMILY = TimmFamily()


def _read(family: TimmFamily, config: Mapping[str, Any], card: WeightsMetadata) -> dict[str, Tensor]:
    return family.converted(hub.read(config), card, hub.where(config))


def _prefixes(card: WeightsMetadata) -> tuple[str, ...]:
    """Prefixes of the heads' tensor names."""
    return tuple(f"{head}." for head in networks.heads(card))


def _through_timm(state: dict[str, Tensor], card: WeightsMetadata, origin: str) -> dict[str, Tensor]:
    """The state as timm loads it: whole, or without a head where it has none."""
    heads = _prefixes(card)
    weight = state.get(f"{heads[0]}weight")
    if weight is not None:
        return networks.loaded(card, state, len(weight), origin)
    with torch.device("meta"):
        lacking = {n: t for n, t in networks.build(card, 2).state_dict().items() if n.startswith(heads)}
    try:
        filled = {**state, **{n: torch.zeros(t.shape, dtype=t.dtype) for n, t in lacking.items()}}
        return {n: t for n, t in networks.loaded(card, filled, 2, origin).items() if not n.startswith(heads)}
    except UserError:
        num_classes = networks.config_of(card).get("num_classes", 0)  # its names are others', so its head may be there
        return networks.loaded(card, state, num_classes, origin)
