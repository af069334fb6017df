"""TrivialAugment (Müller & Hutter 2021, wide) and RandAugment (Cubuk et al. 2020): operations drawn anew for each view.

Operations, their strengths and the order of the draws are those of torchvision's TrivialAugmentWide and RandAugment. What differs: turns,
shears and shifts interpolate, and fill from the image (`affine`) where torchvision leaves black.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tltrain.data.augmentation.affine import Map, rotation, warped

Policy = Literal["trivial", "rand"]
LEVELS = 31
"""Strengths of each operation, from nothing to its most."""
RAND_OPERATIONS, RAND_LEVEL = 2, 9
"""RandAugment's n and m."""
MAPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")
OPERATIONS = ("Identity", *MAPS, *FACTORS, "Posterize", "Solarize", "AutoContrast", "Equalize")
SIGNED = (*MAPS, *FACTORS)


@dataclass(frozen=True)
class Operation:
    """One operation of a view, drawn."""

    name: str
    strength: float = 0.0
    """Shears: the tangent. Translate: pixels. Rotate: degrees. Factors: 0 leaves the image. Posterize: bits. Solarize: share of white."""


@dataclass(frozen=True)
class RandomOperations:
    """Draws the operations of a policy, and applies them to a square RGB image of Pillow."""

    policy: Policy
    mirror: bool
    """As in `affine.warped`."""

    def __call__(self, image: Image.Image) -> Image.Image:
        for operation in draw(self.policy, image.width):
            image = applied(image, operation, self.mirror)
        return image


def draw(policy: Policy, size: int) -> list[Operation]:
    """The operations of one view of side `size`, by torch's generator."""
    drawn = []
    for _ in range(RAND_OPERATIONS if policy == "rand" else 1):
        name = OPERATIONS[int(torch.randint(len(OPERATIONS), ()))]
        strength_L = strengths(policy, name, size)
        if strength_L is None:
            drawn.append(Operation(name))
            continue
        level = RAND_LEVEL if policy == "rand" else int(torch.randint(LEVELS, ()))
        sign = -1 if name in SIGNED and float(torch.rand(())) <= 0.5 else 1
        drawn.append(Operation(name, sign * float(strength_L[level])))
    return drawn


def strengths(policy: Policy, name: str, size: int) -> Tensor | None:
    """The strengths (LEVELS,) of an operation on views of side `size`, without sign. None: it has none."""
    rand = policy == "rand"
    if name == "Solarize":
        return torch.linspace(1.0, 0.0, LEVELS)
    if name == "Posterize":
        return (8 - torch.arange(LEVELS) / ((LEVELS - 1) / (4 if rand else 6))).round()
    if name not in SIGNED:
        return None
    kind = name.rstrip("XY")
    most = {"Shear": (0.3, 0.99), "Translate": (150.0 / 331.0 * size, 32.0), "Rotate": (30.0, 135.0)}.get(kind, (0.9, 0.99))
    return torch.linspace(0.0, most[0 if rand else 1], LEVELS)


def applied(image: Image.Image, operation: Operation, mirror: bool) -> Image.Image:
    """The image after one operation."""
    name, strength = operation.name, operation.strength
    if name in MAPS:
        return warped(image, _map(name, strength, image.width), mirror)
    if name in FACTORS:
        adjust = {"Brightness": F.adjust_brightness, "Color": F.adjust_saturation, "Contrast": F.adjust_contrast}
        return adjust.get(name, F.adjust_sharpness)(image, 1.0 + strength)
    if name == "Posterize":
        return F.posterize(image, int(strength))
    if name == "Solarize":
        return F.solarize(image, 255.0 * strength)
    plain = {"AutoContrast": F.autocontrast, "Equalize": F.equalize}
    return plain[name](image) if name in plain else image


def _map(name: str, strength: float, size: int) -> Map:
    """Shears keep the top left corner in its place, as torchvision's do."""
    if name == "Rotate":
        return rotation(strength, size)
    shear_x, shear_y = (strength if name == f"Shear{axis}" else 0.0 for axis in "XY")
    shift_x, shift_y = (-float(int(strength)) if name == f"Translate{axis}" else 0.0 for axis in "XY")
    return 1.0, shear_x, shift_x, shear_y, 1.0, shift_y
