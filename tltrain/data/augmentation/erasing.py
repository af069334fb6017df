"""Random erasing (Zhong et al. 2020): a rectangle of a view is painted over with the view's mean colour."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.transforms import v2

Box = tuple[int, int, int, int]
"""Top, left, bottom, right; the last two exclusive. All zero: nothing is erased."""
NOTHING: Box = (0, 0, 0, 0)


def draw(probability: float, size: int) -> Box:
    """The rectangle of one view, by torch's generator.

    Its area is 2 to 33 % of the view and its aspect ratio 0.3 to 3.3, as in the paper, torchvision and timm. NOTHING with 1 - probability.
    """
    if probability == 0 or float(torch.rand(1)) >= probability:
        return NOTHING
    drawn = v2.RandomErasing(p=1.0).make_params([torch.empty((3, size, size), device="meta")])
    if drawn["v"] is None:  # no rectangle fitted in ten tries
        return NOTHING
    top, left = drawn["i"], drawn["j"]
    return top, left, top + drawn["h"], left + drawn["w"]


def erase(pixels_HWC: np.ndarray, box: Box) -> np.ndarray:
    """A copy with the rectangle in the mean colour of the image (const of timm, after whose normalisation 0 is a mean colour too).

    Means are rounded half up in integers, so that a device finds the same.
    """
    if box == NOTHING:
        return pixels_HWC
    top, left, bottom, right = box
    count = pixels_HWC.shape[0] * pixels_HWC.shape[1]
    erased_HWC = pixels_HWC.copy()
    erased_HWC[top:bottom, left:right] = (2 * pixels_HWC.sum((0, 1), dtype=np.int64) + count) // (2 * count)
    return erased_HWC
