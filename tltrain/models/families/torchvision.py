"""The torchvision family: every classification network of torchvision (`torchvision:efficientnet_b0`), cut where one tensor lives."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from tltrain.core.errors import UserError, first_line
from tltrain.models import torchvision_hub
from tltrain.models.chain import Block
from tltrain.models.families import resnet
from tltrain.models.family import Family, WeightsSource
from tltrain.models.metadata import WeightsMetadata
from tltrain.models.tracing import CannotCut, grouped_blocks, traced_blocks

PREFIX = "torchvision:"
ANY = f"{PREFIX}NAME"
_HALF = (0.5, 0.5, 0.5)


class _MNASNet(models.MNASNet):  # type: ignore[misc]  # torchvision has no types
    """MNASNet as it is, which takes tensors from a plain dictionary too: torchvision's refuses those whose version nobody says."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, {"version": self._version, **local_metadata}, *rest)


class TorchvisionFamily(Family):
    """torchvision's classification networks, but for the ResNets, which have a family of their own."""

    weights_are = "for a network of torchvision a name of its weights, or DEFAULT"

    def matches(self, name: str) -> bool:
        return name.startswith(PREFIX) and _short(name) in _names()

    def describe(self) -> dict[str, str]:
        return {
            ANY: f"any of torchvision's {len(_names())} other classification networks: `tltrain recipes --backbones QUERY` searches them"
        }

    def search(self, words: str) -> dict[str, str]:
        return {name: torchvision_hub.line(_short(name)) for name in self.all_names() if words in name}

    def all_names(self) -> Collection[str]:
        return [PREFIX + name for name in _names()]

    def default_card(self, name: str) -> WeightsMetadata:
        """As the network's default weights see images."""
        card = WeightsMetadata(name, {}, resnet.IMAGENET_MEAN, resnet.IMAGENET_STD, 224, 256, "bilinear", None)
        entry = torchvision_hub.find(_short(name), "DEFAULT")
        return replace(torchvision_hub.card_of(card, entry), classes=None, **_normalisation(name))

    def head_of(self, card: WeightsMetadata) -> str:
        return _head(card.name)

    def build(self, card: WeightsMetadata, num_classes: int) -> nn.Module:
        """Without auxiliary classifiers."""
        net = torchvision_hub.build(_short(card.name), num_classes, card.size)
        if isinstance(net, models.MNASNet):
            net.__class__ = _MNASNet
        return net

    def blocks(self, net: nn.Module, card: WeightsMetadata, dropout: float) -> list[Block]:
        head = self.head_of(card)
        faster = ("cuda",) if sum(isinstance(m, nn.Conv2d) for m in net.modules()) > 3 else ()
        try:
            return traced_blocks(net, head, dropout, card.size, channels_last=faster)
        except CannotCut as why:
            return grouped_blocks(net, head, str(why))

    def fitted(self, card: WeightsMetadata, size: int, classes: tuple[str, ...] | None) -> WeightsMetadata:
        """As in `Family`. Raises UserError for a size that the network cannot take."""
        card = replace(card, size=size, classes=classes)
        if size != self.default_card(card.name).size:
            try:
                with torch.device("meta"), torch.no_grad():
                    self.build(card, 2).eval()(torch.empty(2, 3, size, size))
            except Exception as error:  # whatever torchvision raises
                why = first_line(error).rstrip(".")
                own = self.default_card(card.name).size
                raise UserError(f"data.size is {size}, and {card.name} cannot take such images ({why}); its own are of {own} px") from error
        return card

    def resized(self, state: Mapping[str, Tensor], card: WeightsMetadata, size: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Interpolate the position embeddings of a ViT once, as torchvision does. The others take any size."""
        if size == card.size or not _short(card.name).startswith("vit_"):
            return dict(state), ()
        patch = int(state["conv_proj.weight"].shape[-1])
        out: Any = interpolate_embeddings(size, patch, dict(state))
        return dict(out), (f"position embeddings interpolated from {card.size} to {size} px",)

    def find_weights(self, name: str | None, weights: str, network: bool) -> WeightsSource | None:
        """Find weights by their torchvision name, such as IMAGENET1K_V1 or DEFAULT. Raises UserError."""
        if name is None or not self.matches(name):
            return None
        default = self.default_card(name)
        entry = torchvision_hub.find(_short(name), weights)
        card = replace(torchvision_hub.card_of(default, entry), **_normalisation(name))
        return WeightsSource(self, card, f"torchvision's {entry}", partial(_read, self, card, entry), _notes(name))

    def converted(self, state: dict[str, Tensor], card: WeightsMetadata, origin: str) -> dict[str, Tensor]:
        return _without_auxiliary(state, card.name)

    def torchvision_name(self, card: WeightsMetadata) -> str | None:
        return _short(card.name)


FAMILY = TorchvisionFamily()


@cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(name for name in models.list_models(module=models) if name not in resnet.TORCHVISION))


@cache
def _head(name: str) -> str:
    """The module that decides on the number of classes: the last linear layer, or the last convolution where it is the classifier."""
    with torch.device("meta"):
        net = torchvision_hub.build(_short(name), 7, None)
    heads = [path for path, m in net.named_modules() if 7 in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    if len(heads) != 1:
        raise UserError(f"{name} has no single classifier (found {', '.join(heads) or 'none'}); name another network")
    return heads[0]


def _short(name: str) -> str:
    return name.removeprefix(PREFIX)


def _normalisation(name: str) -> dict[str, Any]:
    """GoogLeNet's and Inception's weights were made for pixels from -1 to 1: torchvision's `transform_input` undoes ImageNet's mean."""
    return {"mean": _HALF, "std": _HALF} if _short(name) in torchvision_hub.AUXILIARY else {}


def _notes(name: str) -> tuple[str, ...]:
    return ("their auxiliary classifiers left out",) if _short(name) in torchvision_hub.AUXILIARY else ()


def _read(family: Family, card: WeightsMetadata, entry: models.WeightsEnum) -> dict[str, Tensor]:
    """The tensors under the names of today's torchvision: DenseNet's files have older ones, which its own loader renames."""
    state = torchvision_hub.read_state(entry)
    if _short(card.name).startswith("densenet"):
        pattern = r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
        state = torchvision_hub.renamed(state, pattern, r"\1\2")
    return _without_auxiliary(state, card.name)


def _without_auxiliary(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    auxiliary = torchvision_hub.AUXILIARY.get(_short(name), ())
    return {key: tensor for key, tensor in state.items() if not key.startswith(auxiliary)} if auxiliary else state
