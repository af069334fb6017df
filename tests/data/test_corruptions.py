"""Corruptions: values worked out by hand, lengths that grow with the image, and nothing but the arguments decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tltrain.core.recipe import Data
from tltrain.data import open_images
from tltrain.data.corruptions import KINDS, OPERATIONS, SEVERITIES, corrupt
from tltrain.data.corruptions.blur import disc, trail
from tltrain.data.corruptions.views import CELLS, CLEAN, CorruptedViews
from tltrain.data.loader import item_loader
from tltrain.data.sampler import SampleRef
from tltrain.data.views import Preprocess, Views


def grey(value: int, side: int = 128) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def ramp(side: int = 96) -> np.ndarray:
    row = np.linspace(0, 255, side).astype(np.uint8)
    return np.stack([np.tile(row, (side, 1)), np.tile(row[::-1, None], (1, side)), np.full((side, side), 90, np.uint8)], axis=2)


def test_noise_has_the_deviation_that_is_promised() -> None:
    gaussian, shot = (corrupt(grey(128), name, 1, 0, "x") / 255 for name in ("gaussian_noise", "shot_noise"))
    assert gaussian.std() == pytest.approx(0.08, rel=0.03)
    assert shot.std() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.03), "photons are counted: variance is value / photons"
    assert gaussian.mean() == pytest.approx(128 / 255, abs=0.003)
    assert shot.mean() == pytest.approx(128 / 255, abs=0.003)
    impulse = corrupt(grey(128), "impulse_noise", 5, 0, "x")
    assert [(impulse == value).mean() for value in (0, 255, 128)] == pytest.approx([0.135, 0.135, 0.73], abs=0.01)


def test_light_and_contrast_by_hand() -> None:
    pixel = np.tile(np.array([40, 100, 20], np.uint8), (8, 8, 1))
    assert corrupt(pixel, "brightness", 2, 0, "x")[0, 0].tolist() == [60, 151, 30], "100 + 51 for the largest, the others in proportion"
    assert corrupt(grey(0, 8), "brightness", 2, 0, "x")[0, 0].tolist() == [51, 51, 51]
    halves = np.concatenate([grey(0, 8)[:, :4], grey(200, 8)[:, 4:]], axis=1)
    assert np.unique(corrupt(halves, "contrast", 1, 0, "x")).tolist() == [60, 140], "around 100, 0.4 of what there was"


def test_pixelate_makes_blocks_of_their_mean() -> None:
    blocks = np.kron(np.array([[0, 80], [120, 200]], np.uint8), np.ones((2, 2), np.uint8))
    image = np.stack([blocks + np.tile(np.array([[0, 20], [20, 40]], np.uint8), (2, 2))] * 3, axis=2)
    expected = np.kron(np.array([[20, 100], [140, 220]], np.uint8), np.ones((2, 2), np.uint8))
    np.testing.assert_array_equal(corrupt(image, "pixelate", 2, 0, "x")[:, :, 0], expected)


def test_jpeg_loses_more_with_each_severity() -> None:
    lost = [np.abs(corrupt(ramp(), "jpeg", s, 0, "x").astype(float) - ramp()).mean() for s in SEVERITIES]
    assert lost == sorted(lost)
    assert lost[0] > 0.5


def test_a_disc_and_a_trail_by_hand() -> None:
    assert disc(0.4).tolist() == [[1.0]]
    kernel = disc(6.0)
    assert kernel.sum() == pytest.approx(1)
    assert 1 / kernel.max() == pytest.approx(np.pi * 36, rel=0.01), "as heavy as the area of the circle"
    np.testing.assert_allclose(kernel, kernel.T)
    line = trail(4.0, 1e9, 0.0)
    columns = np.arange(len(line)) - len(line) // 2
    assert np.flatnonzero(line.sum(1)).tolist() == [len(line) // 2]
    assert line.sum(0) @ columns == pytest.approx(2.0), "from the middle four pixels to the right, all alike"
    up = trail(4.0, 1e9, 90.0)
    assert up.sum(1) @ columns == pytest.approx(-2.0)


@pytest.mark.parametrize(("name", "variance"), [("defocus_blur", 9 / 4), ("gaussian_blur", 1.0)])
def test_lengths_grow_with_the_image(name: str, variance: float) -> None:
    """Of a point: a disc of radius 3 has the variance 9/4 along an axis, at a side of 224; at twice the side four times that."""
    point = np.zeros((65, 65, 3))
    point[32, 32] = 1.0
    for scale in (1.0, 2.0):
        spread = OPERATIONS[name](point, 1, scale, np.random.default_rng(0))[:, :, 0].sum(0)
        assert spread @ (np.arange(65) - 32) ** 2 == pytest.approx(variance * scale**2, rel=0.05)


def test_fog_covers_a_grey_image_by_hand() -> None:
    """Grey 0.5 under clouds from 0 to 1 in amount 1.5: (0.5 + 1.5 c) 0.5 / (0.5 + 1.5), from 0.125 to 0.5. 127 is 0.498."""
    foggy = corrupt(grey(127), "fog", 1, 0, "x")
    top = 127 / 255
    assert [foggy.min(), foggy.max()] == [round(255 * top * top / (top + 1.5)), 127]


def test_snow_only_brightens_and_falls_thicker() -> None:
    snowy = [corrupt(ramp(), "snow", s, 0, "x").astype(int) for s in SEVERITIES]
    assert all((image >= ramp().astype(int)).all() for image in snowy)
    means = [image.mean() for image in snowy]
    assert means == sorted(means)


@pytest.mark.parametrize("name", [name for kind in ("blur", "noise", "weather") for name in KINDS[kind]])
def test_edges_and_levels_stay(name: str) -> None:
    """A blurred grey image is the same grey to its edges; whatever the corruption, the image keeps its size and type."""
    changed = corrupt(grey(77, 40), name, 5, 0, "x")
    assert changed.dtype == np.uint8
    assert changed.shape == (40, 40, 3)
    if name.endswith("blur"):
        assert (changed == 77).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_arguments_alone_decide(name: str) -> None:
    image = ramp(48)
    np.random.seed(1)
    first = corrupt(image, name, 3, 0, "a.png")
    corrupt(image, name, 3, 0, "b.png")
    np.testing.assert_array_equal(corrupt(image, name, 3, 0, "a.png"), first)
    random = name not in ("defocus_blur", "gaussian_blur", "brightness", "contrast", "pixelate", "jpeg")
    for other in (corrupt(image, name, 3, 1, "a.png"), corrupt(image, name, 3, 0, "b.png")):
        assert (other != first).any() == random


def test_data_workers_make_the_same_pixels(photos: Path) -> None:
    """Each view is the evaluation view of its image, corrupted by its name: in this process and in others."""
    images = open_images(Data(source=f"folder:{photos}", val_fraction=0, test_fraction=0))
    views = CorruptedViews(images.train, Preprocess(32, 36), seed=5)
    plain = Views(images.train, Preprocess(32, 36), "none", False, 5)
    items = [[SampleRef(i, v) for i in (0, 3)] for v in (0, 1, 15, len(CELLS) - 1)]
    alone, shared = (list(item_loader(views, items, workers, False)) for workers in (0, 2))
    for part, one, other in zip(items, alone, shared, strict=True):
        assert one["image"].equal(other["image"])
        for (i, v, *_), pixels in zip(part, one["image"], strict=True):
            clean = plain.view(i, 0).permute(1, 2, 0).numpy()
            expected = clean if CELLS[v] == CLEAN else corrupt(clean, *CELLS[v], 5, images.train.ids[i])
            np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)
