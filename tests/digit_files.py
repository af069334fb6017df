"""scikit-learn's digits as image files in folders, and run folders with given weights: for the tests of what a person takes away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tltrain.core.recipe import Recipe
from tltrain.models import factory

SPLITS = {"train": slice(0, 8), "val": slice(8, 11), "test": slice(11, 15)}


def digit_image(number: int) -> Image.Image:
    """One of scikit-learn's digits, 48 x 40 pixels, RGB, dark on light as on paper."""
    pixels = 255 - (load_digits().images[number] * 15).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB").resize((48, 40), Image.Resampling.BICUBIC)


def digit_folder(root: Path, num_classes: int = 4) -> Path:
    """train, val and test, each with a subfolder for each digit, of PNG files."""
    target = load_digits().target
    for k in range(num_classes):
        numbers = np.flatnonzero(target == k)
        for split, part in SPLITS.items():
            (root / split / f"digit {k}").mkdir(parents=True)
            for n in numbers[part]:
                digit_image(int(n)).save(root / split / f"digit {k}" / f"{n}.png")
    return root


def run_with_weights(path: Path, recipe: Recipe, classes: tuple[str, ...], temperature: float = 1.0, seed: int = 0) -> Path:
    """A run folder whose network is random in every tensor, BatchNorm's statistics and the head included."""
    loaded = factory.load(recipe.backbone, classes=classes, size=recipe.data.size, resize=recipe.data.resize, head="new", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    state = {name: _random(name, t, generator) for name, t in loaded.chain.net.state_dict().items()}
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(recipe.to_yaml())
    card = factory.WeightsMetadata(**{**loaded.card.__dict__, "temperature": temperature})
    factory.write_weights(path / "weights.safetensors", state, card)
    return path


def _random(name: str, t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not t.is_floating_point():
        return t
    drawn: Callable[[torch.Tensor], torch.Tensor] = {
        "running_var": lambda x: 0.5 + x.abs(),
        "running_mean": lambda x: 0.1 * x,
    }.get(name.rsplit(".", 1)[-1], lambda x: t + 0.02 * x)
    return drawn(torch.randn(t.shape, generator=generator))
