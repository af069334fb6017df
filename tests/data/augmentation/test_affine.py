"""Turns, shears and shifts are Pillow's where the image is, and continue the image where it is not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tltrain.data.augmentation import affine

SIZE = 40
MAPS = {
    "turned": affine.rotation(10, SIZE),
    "turned far": affine.rotation(-135, SIZE),
    "sheared": (1.0, 0.99, 0.0, 0.0, 1.0, 0.0),
    "shifted": (1.0, 0.0, -32.0, 0.0, 1.0, 7.0),
    "shifted by more than its side": (1.0, 0.0, 90.0, 0.0, 1.0, 0.0),
}


def _noise(size: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (size, size, 3), dtype=np.uint8))


def _at(pixels_HWC: np.ndarray, row: int, column: int, mirror: bool) -> np.ndarray:
    """A pixel of the image that goes on without end."""

    def inside(i: int) -> int:
        if not mirror:
            return min(max(i, 0), SIZE - 1)
        i %= 2 * (SIZE - 1)
        return min(i, 2 * (SIZE - 1) - i)

    return pixels_HWC[inside(row), inside(column)].astype(float)


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("name", MAPS)
def test_beyond_its_edge_an_image_is_reflected_or_its_edge_repeated(name: str, mirror: bool) -> None:
    """Bilinear interpolation written down once more, over an image without end."""
    a, b, c, d, e, f = MAPS[name]
    before = np.asarray(_noise())
    after = np.asarray(affine.warped(_noise(), MAPS[name], mirror)).astype(float)
    rng = np.random.default_rng(1)
    for row, column in [(0, 0), (0, SIZE - 1), (SIZE - 1, 0), (SIZE - 1, SIZE - 1), *rng.integers(0, SIZE, (60, 2)).tolist()]:
        x = a * (column + 0.5) + b * (row + 0.5) + c - 0.5
        y = d * (column + 0.5) + e * (row + 0.5) + f - 0.5
        x0, y0 = int(np.floor(x)), int(np.floor(y))
        upper, lower = ((1 - (x - x0)) * _at(before, r, x0, mirror) + (x - x0) * _at(before, r, x0 + 1, mirror) for r in (y0, y0 + 1))
        assert np.abs(after[row, column] - ((1 - (y - y0)) * upper + (y - y0) * lower)).max() < 1.001, (row, column)


@pytest.mark.parametrize("angle", [0, 7.5, -10, 45, 90, 135])
def test_a_turn_is_pillows_own_where_pillow_has_pixels(angle: float) -> None:
    bordered = np.zeros((SIZE, SIZE, 3), np.uint8)
    bordered[1:-1, 1:-1] = 255
    known = (np.asarray(Image.fromarray(bordered).rotate(angle, Image.Resampling.BILINEAR)) == 255).all(2)
    assert known.mean() > 0.5
    ours = np.asarray(affine.warped(_noise(), affine.rotation(angle, SIZE), True)).astype(int)
    pillows = np.asarray(_noise().rotate(angle, Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - pillows)[known].max() <= 1  # the padding moves the origin, and with it the last bit of a float


def test_no_corner_is_black() -> None:
    light = Image.fromarray(np.full((SIZE, SIZE, 3), 200, np.uint8))
    for name, map_ in MAPS.items():
        for mirror in (True, False):
            assert (np.asarray(affine.warped(light, map_, mirror)) == 200).all(), name


def test_without_mirroring_nothing_rises_where_the_image_falls() -> None:
    """A picture that falls from left to right shows no rising part, however far it is shifted. Its reflection would."""
    ramp = Image.fromarray(np.repeat(np.linspace(255, 0, SIZE).astype(np.uint8)[None, :, None], SIZE, 0).repeat(3, 2))
    for shift in (-30.0, 30.0):
        rises = {
            m: (np.diff(np.asarray(affine.warped(ramp, (1.0, 0.0, shift, 0.0, 1.0, 0.0), m)).astype(int), axis=1) > 0).any()
            for m in (True, False)
        }
        assert rises == {True: True, False: False}
