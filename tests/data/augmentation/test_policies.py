"""TrivialAugment and RandAugment are torchvision's: its operations, strengths and draws, without its black corners."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tltrain.data.augmentation import policies
from tltrain.data.augmentation.policies import LEVELS, MAPS, OPERATIONS, SIGNED, Operation, Policy, applied, draw, strengths

SIZE = 48
TORCHVISIONS = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}
POLICIES: list[Policy] = ["trivial", "rand"]


def _theirs(policy: Policy) -> v2.Transform:
    return TORCHVISIONS[policy](interpolation=v2.InterpolationMode.BILINEAR)


def _picture() -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(20, 200, (SIZE, SIZE, 3), dtype=np.uint8))


def _white_inside() -> Image.Image:
    """White but for a black edge: what of it is white has not been made of what lies beyond the edge."""
    pixels_HWC = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels_HWC[1:-1, 1:-1] = 255
    return Image.fromarray(pixels_HWC)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_strengths_are_torchvisions(policy: Policy, name: str) -> None:
    for size in (32, 224):
        magnitudes, signed = _theirs(policy)._AUGMENTATION_SPACE[name]
        theirs, ours = magnitudes(LEVELS, size, size), strengths(policy, name, size)
        assert signed == (name in SIGNED)
        if theirs is None:
            assert ours is None
        else:
            assert ours is not None
            assert torch.equal(ours, theirs.to(ours.dtype))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_makes_torchvisions_pixels_where_torchvision_has_pixels(policy: Policy, name: str) -> None:
    strength_L = strengths(policy, name, SIZE)
    levels = [0.0] if strength_L is None else [sign * float(strength_L[level]) for level in (0, 9, 30) for sign in (1, -1)]
    theirs = _theirs(policy)
    for strength in levels if name in SIGNED else levels[::2] or levels:
        ours = np.asarray(applied(_picture(), Operation(name, strength), mirror=True)).astype(int)
        expected, known = (
            np.asarray(theirs._apply_image_or_video_transform(image, name, strength, theirs.interpolation, theirs._fill)).astype(int)
            for image in (_picture(), _white_inside())
        )
        where = (known == 255).all(2) if name in MAPS else np.ones((SIZE, SIZE), bool)
        assert where.mean() > 0.05
        assert np.abs(ours - expected)[where].max() <= (1 if name in MAPS else 0), strength


@pytest.mark.parametrize("policy", POLICIES)
def test_the_draws_are_torchvisions_under_one_seed(policy: Policy) -> None:
    """Of the operations that leave no corner open, whose pixels are then equal."""
    compared = 0
    for seed in range(60):
        torch.manual_seed(seed)
        drawn = draw(policy, SIZE)
        assert len(drawn) == (2 if policy == "rand" else 1)
        if not any(operation.name in MAPS for operation in drawn):
            torch.manual_seed(seed)
            ours = policies.RandomOperations(policy, mirror=True)(_picture())
            torch.manual_seed(seed)
            assert ours.tobytes() == _theirs(policy)(_picture()).tobytes(), drawn
            compared += 1
    assert compared > 10


def test_every_operation_is_drawn_and_none_mirrors() -> None:
    drawn = set()
    torch.manual_seed(0)
    for _ in range(400):
        drawn |= {operation.name for operation in draw("trivial", SIZE)}
    assert drawn == set(OPERATIONS)
    assert not [name for name in drawn if "flip" in name.lower() or "mirror" in name.lower()]
    assert set(get_args(Policy)) == set(TORCHVISIONS)
    halves = Image.fromarray(
        np.repeat(np.where(np.arange(SIZE) < SIZE // 2, 60, 180).astype(np.uint8)[None, :, None], SIZE, 0).repeat(3, 2)
    )
    for name in set(OPERATIONS) - {"Rotate", "Solarize"}:  # these turn it, or turn its greys round
        for strength in (-0.5, 0.5) if name not in ("Posterize", "TranslateX", "TranslateY") else (4.0, 8.0):
            pixels_HW = np.asarray(applied(halves, Operation(name, strength), mirror=False))[:, :, 0].astype(int)
            assert (np.diff(pixels_HW, axis=1) >= 0).all() or name == "Sharpness", name
