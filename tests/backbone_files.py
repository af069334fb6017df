"""What the tests of weights share: small nets, real files, and what must hold of what was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from tltrain.core.recipe import Backbone
from tltrain.models import factory
from tltrain.models.factory import Loaded

CLASSES = ("ant", "bee", "cat")
SMALL: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 8}


def load(name: str | None, weights: str | Path, **settings: Any) -> Loaded:
    defaults = {"classes": CLASSES, "size": None, "resize": None, "head": "new", "seed": 0}
    return factory.load(Backbone(name=name, weights=str(weights)), **{**defaults, **settings})


def config(image_size: int = 32, classes: tuple[str, ...] = CLASSES) -> ViTConfig:
    return ViTConfig(image_size=image_size, id2label=dict(enumerate(classes)), label2id={c: i for i, c in enumerate(classes)}, **SMALL)


def vit_net(image_size: int = 32, classes: tuple[str, ...] = CLASSES) -> ViTForImageClassification:
    """Random weights, the biases and the head too, so that no tensor is what a fresh net would hold."""
    net = ViTForImageClassification(config(image_size, classes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return net


def images(size: int = 32) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def assert_same(state: dict[str, Tensor], want: dict[str, Tensor], but: str) -> None:
    assert set(state) == set(want)
    for name, tensor in want.items():
        if not name.startswith(but):
            assert torch.equal(state[name], tensor), name


def assert_head_is_zero(loaded: Loaded, classes: int) -> None:
    logits = loaded.chain(images(loaded.card.size))
    assert torch.equal(logits, torch.zeros(2, classes))


def ours(path: Path, name: str = "resnet-micro", classes: tuple[str, ...] = CLASSES) -> Loaded:
    """A file of ours with random weights, the head's too, and the chain it was written from."""
    loaded = factory.load(Backbone(name=name), classes=classes, size=None, resize=None, head="new", seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in loaded.chain.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    factory.write_weights(path, loaded.chain.net.state_dict(), loaded.card)
    return loaded
