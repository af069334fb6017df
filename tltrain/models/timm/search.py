"""Searches timm's networks by name, and says of each its parameters, image size and weights."""

from __future__ import annotations

import torch

from tltrain.core.errors import UserError
from tltrain.models.timm import networks

MOST_BUILT = 30
"""Of so many the parameters are counted. For that each is built without values, which takes some 0.1 s."""


def names() -> list[str]:
    """The names of all networks that timm has. Empty where it is not installed."""
    try:
        return [networks.PREFIX + name for name in networks.library().list_models()]
    except UserError:
        return []


def found(words: str) -> dict[str, str]:
    """Maps each network whose name holds `words`, or whose weights' tags do, to a line about it. Empty where timm is not installed."""
    known = [name.removeprefix(networks.PREFIX) for name in names()]
    words = words.removeprefix(networks.PREFIX)
    hits = [name for name in known if words in name]
    hits = hits or [name for name in known if any(words in f"{name}.{tag}" for tag in networks.tags(name))]
    return {networks.PREFIX + name: _line(name, counted=i < MOST_BUILT) for i, name in enumerate(hits)}


def _line(architecture: str, counted: bool) -> str:
    config = networks.library().models.get_pretrained_cfg(architecture)
    tags = networks.tags(architecture)
    parts = [] if config is None else [f"{min(config.input_size[1:])} px"]
    if counted and config is not None:
        card = networks.card_of(architecture, config.to_dict(), None)
        try:
            with torch.device("meta"):
                net = networks.build(card, 2)
            parts.insert(0, f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters")
        except UserError:
            parts.append("cannot be built here")
    return f"{', '.join(parts)}; weights: {', '.join(tags) if tags else 'none'}"
