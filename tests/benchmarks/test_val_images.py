"""The benchmark of val's worth: it sets a head that learns from val against one that does not, on the same test images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import val_images


def test_more_images_are_worth_something_and_test_is_the_same() -> None:
    random = np.random.default_rng(0)
    label_N = np.repeat(np.arange(3), 40)
    features_ND = torch.from_numpy(random.normal(size=(120, 16)) + 0.8 * random.normal(size=(3, 16))[label_N])
    group_N = np.arange(120)
    without, with_val, sizes = val_images.one_split("ridge", features_ND, label_N, group_N, 4, 0)
    assert sizes == (9, 3)
    assert without[0] * 24 / 100 == pytest.approx(round(without[0] * 24 / 100)), "of 24 test images"
    assert with_val[0] * 24 / 100 == pytest.approx(round(with_val[0] * 24 / 100))
    line = val_images.row("ridge", features_ND, label_N, group_N, 4, 20)
    assert line.startswith("| 4 | 9 | 3 | ")
    assert "| +" in line.split(" | ", 4)[-1] or line.split(" | ")[4].startswith("+"), "a third more images, and none gained?"


def test_the_calibration_error_is_that_of_runs() -> None:
    sure = torch.tensor([[9.0, -9.0], [9.0, -9.0], [-9.0, 9.0], [9.0, -9.0]])
    top1, _, apart = val_images._figures(sure, np.array([0, 1, 1, 1]))
    assert top1 == 50.0
    assert apart == pytest.approx(50.0, abs=0.1)
