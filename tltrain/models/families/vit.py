"""The ViT family: transformers' ViTForImageClassification as a chain, with interpolation of position embeddings.

transformers takes half a second to import. So code that needs it is in `hf_hub`, which the methods import when they run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tltrain.core.errors import UserError
from tltrain.models.chain import Block, LastMap
from tltrain.models.families.common import head_block
from tltrain.models.family import Family, WeightsSource
from tltrain.models.metadata import WeightsMetadata

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ViTForImageClassification

ANY = "vit"
"""Name for a ViT of any shape. The configuration comes from the weights."""
POSITIONS = "vit.embeddings.position_embeddings"
_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
SIZES = {
    "vit-tiny": (96, 4, 4, 192, 8),
    "vit-s16": (384, 12, 6, 1536, 16),
    "vit-b16": (768, 12, 12, 3072, 16),
    "vit-l16": (1024, 24, 16, 4096, 16),
}
_IMAGE_SIZE = {"vit-tiny": 32}
_DEFAULTS = {
    "vit-tiny": "shipped:vit-tiny-printed",
    "vit-b16": "google/vit-base-patch16-224-in21k",
    "vit-l16": "google/vit-large-patch16-224-in21k",
}
"""Their authors published no vit-s16 for transformers."""


class VitFamily(Family):
    """transformers' `ViTForImageClassification` of any size."""

    blocks_are_tested = True
    weights_are = "for a ViT a hub id like google/vit-base-patch16-224-in21k"

    def matches(self, name: str) -> bool:
        return name in SIZES or name == ANY

    def describe(self) -> dict[str, str]:
        lines = {}
        for name, (hidden, layers, heads, mlp, patch) in SIZES.items():
            image = _IMAGE_SIZE.get(name, 224)
            size = f"{layers * (4 * hidden * hidden + 2 * hidden * mlp) / 1e6:.1f} M parameters"
            lines[name] = f"ViT of {layers} blocks, width {hidden}, {heads} heads, patch {patch}, {image} px, about {size}"
        return {**lines, ANY: "any ViT of a hub id or a save_pretrained folder: its own configuration says what it is"}

    def default_card(self, name: str) -> WeightsMetadata:
        if name == ANY:
            known = ", ".join(SIZES)
            raise UserError(f"backbone.name {ANY!r} takes its configuration from weights, and these have none; name one of {known}")
        from tltrain.models import hf_hub

        image_size = _IMAGE_SIZE.get(name, 224)
        config = hf_hub.plain_config({"image_size": image_size, **dict(zip(_SHAPE, SIZES[name], strict=True))})
        return WeightsMetadata(name, config, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), image_size, image_size, "bilinear", None)

    def head_of(self, card: WeightsMetadata) -> str:
        return "classifier"

    def build(self, card: WeightsMetadata, num_classes: int) -> ViTForImageClassification:
        from tltrain.models import hf_hub

        return hf_hub.build(card, num_classes)

    def blocks(self, net: nn.Module, card: WeightsMetadata, dropout: float) -> list[Block]:
        """embed, block.0, ..., block.N-1, head. Block N-1 includes the final norm and returns the class token (B, D)."""
        last = len(cast("ViTForImageClassification", net).vit.layers) - 1
        body = [Block(f"block.{i}", (f"vit.layers.{i}",), partial(_layer, i)) for i in range(last)]
        maps, owns = LastMap(partial(_tokens, last)), (f"vit.layers.{last}", "vit.layernorm")
        end = Block(f"block.{last}", owns, partial(_last, last), last_map=maps)
        return [Block("embed", ("vit.embeddings",), _embed), *body, end, head_block(self.head_of(card), dropout)]

    def fitted(self, card: WeightsMetadata, size: int, classes: tuple[str, ...] | None) -> WeightsMetadata:
        """As in `Family`. Raises UserError where the patch size does not divide the image size, and for an invalid ViT configuration."""
        from tltrain.models import hf_hub

        if missing := {*_SHAPE, "image_size"} - set(card.config):
            raise UserError(f"the card of {card.name} has no {', '.join(sorted(missing))}; get the weights anew, or other ones")
        hf_hub.check_config(card.config, f"the card of {card.name}")
        patch = card.config["patch_size"]
        if size % patch:
            near = " or ".join(str(n * patch) for n in (size // patch, size // patch + 1) if n)
            raise UserError(f"data.size is {size}, which the patch of {card.name}, {patch} pixels, does not divide; take {near}")
        config = {**card.config, "image_size": size}
        if classes is not None:
            config["id2label"] = {str(i): name for i, name in enumerate(classes)}
            config["label2id"] = {name: i for i, name in enumerate(classes)}
        return replace(card, config=config, size=size, classes=classes)

    def resized(self, state: Mapping[str, Tensor], card: WeightsMetadata, size: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Interpolate the position embeddings once, in the weights."""
        was = card.config["image_size"]
        if size == was:
            return dict(state), ()
        positions = interpolate_positions(state[POSITIONS], size // card.config["patch_size"])
        return {**state, POSITIONS: positions}, (f"position embeddings interpolated from {was} to {size} px",)

    def mismatch(self, name: str, card: WeightsMetadata) -> str | None:
        """Compare configurations, since weights of a known size may also be named `vit`."""
        if not self.matches(card.name):
            return super().mismatch(name, card)
        wrong = _differences(name, card.config)
        return f"have {', '.join(wrong)}; set the name to {ANY} or null" if wrong else None

    def default_weights(self, name: str) -> str | None:
        return _DEFAULTS.get(name)

    def find_weights(self, name: str | None, weights: str, network: bool) -> WeightsSource | None:
        """Find weights by their Hugging Face hub id, in the hub's cache or by download. Raises UserError."""
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", weights, re.ASCII):
            return None
        from tltrain.models import hf_hub

        try:
            folder = hf_hub.download(weights, network=network)
        except UserError:
            if network or name is None or name == ANY:
                raise
            note = "it is not in the hub's cache: size, mean and std are assumed from the name"
            return WeightsSource(self, self.default_card(name), f"hub {weights}", None, (note,))
        if name is None and not hf_hub.is_vit(folder):
            return None
        return self._pretrained(folder, f"hub {weights} at revision {folder.name[:12]}")

    def read_folder(self, folder: Path) -> WeightsSource | None:
        """Find weights in a folder written by save_pretrained. Raises UserError."""
        if not (folder / "config.json").is_file():
            return None
        from tltrain.models import hf_hub

        return self._pretrained(folder, str(folder)) if hf_hub.is_vit(folder) else None

    def _pretrained(self, folder: Path, origin: str) -> WeightsSource:
        from tltrain.models import hf_hub

        card, notes = hf_hub.read_card(folder)
        return WeightsSource(self, replace(card, name=_name_of(card.config)), origin, partial(hf_hub.read_state, folder), notes)

    def converted(self, state: dict[str, Tensor], card: WeightsMetadata, origin: str) -> dict[str, Tensor]:
        """Convert through transformers, which also reads the tensor names of its earlier versions. Raises UserError."""
        from tltrain.models import hf_hub

        return hf_hub.convert(state, card, origin)

    def to_transformers(self, net: nn.Module, card: WeightsMetadata) -> PreTrainedModel | None:
        return cast("ViTForImageClassification", net)


FAMILY = VitFamily()


def interpolate_positions(positions_1ND: Tensor, side: int) -> Tensor:
    """Resize position embeddings (1, 1 + n^2, D), class token first, to a grid of side x side patches: (1, 1 + side^2, D).

    Bicubic and in fp32, and the class token is kept. transformers' ``interpolate_pos_encoding`` does the same in every forward pass.
    """
    token, grid = positions_1ND[:, :1].float(), positions_1ND[:, 1:].float()
    n = round(grid.shape[1] ** 0.5)
    grid_1DHW = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2)
    grid_1DHW = F.interpolate(grid_1DHW, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((token, grid_1DHW.permute(0, 2, 3, 1).reshape(1, side * side, -1)), dim=1)


def _name_of(config: Mapping[str, Any]) -> str:
    """The backbone's name for a configuration, or `vit` where its shape has no name here."""
    shape = tuple(config[key] for key in _SHAPE)
    return next((name for name, known in SIZES.items() if known == shape), ANY)


def _differences(name: str, config: Mapping[str, Any]) -> list[str]:
    """Differences of a configuration from the network `name`: a list such as ["hidden_size 192, not 768"]."""
    if name == ANY:
        return []
    return [f"{key} {config.get(key)}, not {want}" for key, want in zip(_SHAPE, SIZES[name], strict=True) if config.get(key) != want]


def _embed(net: nn.Module, x_BCHW: Tensor) -> Tensor:
    return cast("ViTForImageClassification", net).vit.embeddings(x_BCHW)


def _layer(i: int, net: nn.Module, x_BTD: Tensor) -> Tensor:
    return cast("ViTForImageClassification", net).vit.layers[i](x_BTD, None)


def _tokens(i: int, net: nn.Module, x_BTD: Tensor) -> Tensor:
    vit = cast("ViTForImageClassification", net).vit
    return vit.layernorm(vit.layers[i](x_BTD, None))


def _last(i: int, net: nn.Module, x_BTD: Tensor) -> Tensor:
    return _tokens(i, net, x_BTD)[:, 0, :]
