"""Random erasing: how often, how large and where, and that what is erased has the view's mean colour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from tltrain.data.augmentation.erasing import NOTHING, draw, erase


def _boxes(probability: float, num: int = 600, size: int = 100) -> list[tuple[int, int, int, int]]:
    torch.manual_seed(0)
    return [draw(probability, size) for _ in range(num)]


def test_rectangles_come_as_often_and_as_large_as_they_should() -> None:
    assert set(_boxes(0.0)) == {NOTHING}
    assert NOTHING not in _boxes(1.0)
    erased = [box for box in _boxes(0.25) if box != NOTHING]
    assert 0.18 < len(erased) / 600 < 0.32
    areas = [(bottom - top) * (right - left) / 1e4 for top, left, bottom, right in _boxes(1.0)]
    ratios = [(bottom - top) / (right - left) for top, left, bottom, right in _boxes(1.0)]
    assert 0.018 < min(areas) < 0.03
    assert 0.3 < max(areas) < 0.345
    assert min(ratios) < 0.5
    assert max(ratios) > 2
    assert all(0 <= top < bottom <= 100 and 0 <= left < right <= 100 for top, left, bottom, right in _boxes(1.0))


def test_a_rectangle_is_the_one_that_torchvision_erases_under_the_same_seed() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        top, left, bottom, right = draw(1.0, 64)
        torch.manual_seed(seed)
        theirs_HW = v2.RandomErasing(p=1.0, value=1)(torch.zeros(3, 64, 64))[0]
        ours_HW = torch.zeros(64, 64)
        ours_HW[top:bottom, left:right] = 1
        assert torch.equal(ours_HW, theirs_HW)


def test_what_is_erased_has_the_mean_colour_and_the_rest_stays() -> None:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    before = pixels_HWC.copy()
    erased = erase(pixels_HWC, (3, 5, 13, 25))
    assert (pixels_HWC == before).all()
    inside = np.zeros((30, 30), bool)
    inside[3:13, 5:25] = True
    assert (erased[~inside] == before[~inside]).all()
    assert (erased[inside] == np.floor(before.reshape(-1, 3).mean(0) + 0.5)).all()
    assert erase(pixels_HWC, NOTHING) is pixels_HWC


@pytest.mark.parametrize("greys", [(0, 1), (254, 255)])
def test_a_mean_between_two_greys_is_rounded_up(greys: tuple[int, int]) -> None:
    pixels_HWC = np.array([greys, greys], np.uint8)[..., None].repeat(3, 2)
    assert erase(pixels_HWC, (0, 0, 1, 1))[0, 0].tolist() == [greys[1]] * 3
