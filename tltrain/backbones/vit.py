"""transformers' ViT family as chains, its small members, and the interpolation of position embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from tltrain.backbones.card import Card
from tltrain.backbones.steps import head_block
from tltrain.blocks import Block
from tltrain.errors import UserError

HEAD = "classifier"
ANY = "vit"
"""The name of whatever the weights' configuration says."""
POSITIONS = "vit.embeddings.position_embeddings"
_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
SIZES = {
    "vit-tiny": (96, 4, 4, 192, 8),
    "vit-s16": (384, 12, 6, 1536, 16),
    "vit-b16": (768, 12, 12, 3072, 16),
    "vit-l16": (1024, 24, 16, 4096, 16),
}
_IMAGE_SIZE = {"vit-tiny": 32}
_VOLATILE = ("transformers_version", "_name_or_path", "dtype")


def names() -> dict[str, str]:
    """Name to a one-line description."""
    lines = {}
    for name, (hidden, layers, heads, mlp, patch) in SIZES.items():
        image = _IMAGE_SIZE.get(name, 224)
        millions = layers * (4 * hidden * hidden + 2 * hidden * mlp) / 1e6
        lines[name] = f"ViT of {layers} blocks, width {hidden}, {heads} heads, patch {patch}, {image} px, about {millions:.1f} M parameters"
    return {**lines, ANY: "any ViT of a hub id or a save_pretrained folder: its own configuration says what it is"}


def default_card(name: str) -> Card:
    """What holds for a ViT whose weights say nothing of themselves. Raises UserError."""
    if name == ANY:
        raise UserError(f"backbone.name {ANY!r} takes its configuration from weights, and these have none; name one of {', '.join(SIZES)}")
    image_size = _IMAGE_SIZE.get(name, 224)
    config = ViTConfig.from_dict({"image_size": image_size, **dict(zip(_SHAPE, SIZES[name], strict=True))})
    return Card(name, plain(config), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), image_size, image_size, "bilinear", None)


def plain(config: ViTConfig) -> dict[str, Any]:
    """A configuration as JSON values, without what changes from one writer to the next."""
    values = json.loads(json.dumps(config.to_dict()))
    return {**{k: v for k, v in values.items() if k not in _VOLATILE}, "architectures": ["ViTForImageClassification"]}


def name_of(config: Mapping[str, Any]) -> str:
    """The backbone's name for a configuration: `vit` where it has none of its own."""
    shape = tuple(config[key] for key in _SHAPE)
    return next((name for name, known in SIZES.items() if known == shape), ANY)


def differences(name: str, config: Mapping[str, Any]) -> list[str]:
    """Where a configuration is not what `name` says: one `hidden_size 192, not 768` each."""
    if name == ANY:
        return []
    return [f"{key} {config[key]}, not {want}" for key, want in zip(_SHAPE, SIZES[name], strict=True) if config[key] != want]


def build(card: Card, num_classes: int) -> ViTForImageClassification:
    """The net on the current default device, with random weights."""
    config = ViTConfig.from_dict(card.config)
    config.num_labels = num_classes
    return ViTForImageClassification(config)


def blocks(net: nn.Module, dropout: float) -> list[Block]:
    """embed, block.0, ..., block.N-1 (with the final norm and the class token), head."""
    last = len(cast(ViTForImageClassification, net).vit.layers) - 1
    body = [Block(f"block.{i}", (f"vit.layers.{i}",), partial(_layer, i)) for i in range(last)]
    end = Block(f"block.{last}", (f"vit.layers.{last}", "vit.layernorm"), partial(_last, last))
    return [Block("embed", ("vit.embeddings",), _embed), *body, end, head_block(HEAD, dropout)]


def fitted(card: Card, size: int, classes: tuple[str, ...] | None) -> Card:
    """The card of the same net for images of `size` pixels and these classes. Raises UserError where the patch does not divide the size."""
    patch = card.config["patch_size"]
    if size % patch:
        near = " or ".join(str(n * patch) for n in (size // patch, size // patch + 1) if n)
        raise UserError(f"data.size is {size}, which the patch of {card.name}, {patch} pixels, does not divide; take {near}")
    config = {**card.config, "image_size": size}
    if classes is not None:
        config["id2label"] = {str(i): name for i, name in enumerate(classes)}
        config["label2id"] = {name: i for i, name in enumerate(classes)}
    return replace(card, config=config, size=size, classes=classes)


def resized(state: Mapping[str, Tensor], card: Card, size: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the state dict of `card` for images of `size` pixels, lines that say what was done).

    Position embeddings are interpolated here, once, on the weights.
    """
    was = card.config["image_size"]
    if size == was:
        return dict(state), ()
    positions = interpolate_positions(state[POSITIONS], size // card.config["patch_size"])
    return {**state, POSITIONS: positions}, (f"position embeddings interpolated from {was} to {size} px",)


def interpolate_positions(positions_1ND: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n^2, D), class token first, for a grid of side x side patches: (1, 1 + side^2, D).

    As transformers' ``interpolate_pos_encoding`` does it in every forward: bicubic, the class token kept; in fp32.
    """
    token, grid = positions_1ND[:, :1].float(), positions_1ND[:, 1:].float()
    n = round(grid.shape[1] ** 0.5)
    grid_1DHW = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2)
    grid_1DHW = F.interpolate(grid_1DHW, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((token, grid_1DHW.permute(0, 2, 3, 1).reshape(1, side * side, -1)), dim=1)


def _embed(net: nn.Module, x_BCHW: Tensor) -> Tensor:
    return cast(ViTForImageClassification, net).vit.embeddings(x_BCHW)


def _layer(i: int, net: nn.Module, x_BTD: Tensor) -> Tensor:
    return cast(ViTForImageClassification, net).vit.layers[i](x_BTD, None)


def _last(i: int, net: nn.Module, x_BTD: Tensor) -> Tensor:
    vit = cast(ViTForImageClassification, net).vit
    return vit.layernorm(vit.layers[i](x_BTD, None))[:, 0, :]
