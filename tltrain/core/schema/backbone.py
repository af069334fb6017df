"""The part of a recipe that names a network."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from tltrain.core.schema.data import Model


class Backbone(Model):
    """A network family, and where its weights come from."""

    name: Annotated[str | None, BeforeValidator(lambda v: None if str(v).lower() in ("none", "null") else v)] = None
    """resnet50, vit-b16, timm:NAME, torchvision:NAME, hf:ID, ... (`tltrain recipes --backbones`); null: read from the weights."""
    weights: Annotated[str | None, BeforeValidator(lambda v: None if str(v).lower() in ("none", "null", "random") else v)] = None
    """A run folder, a file (.safetensors, .pth, ...), a hub id, a folder of save_pretrained, a torchvision name, DEFAULT; null: random."""
    mean: tuple[float, float, float] | None = None
    """Per-channel mean that is subtracted from images in [0, 1]; null takes the weights' own."""
    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation that images in [0, 1] are divided by; null takes the weights' own."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a feature in front of the head while it trains."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.name is None and self.weights is None:
            raise ValueError("name and weights are both null; name a backbone, or weights that say what they are")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; each value must be above 0")
        return self
