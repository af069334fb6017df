"""Where in an image a network found its answer: Grad-CAM (Selvaraju et al. 2017) at the last place where a network still has a map."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tltrain.models.chain import Chain
from tltrain.models.tracing.maps import as_map

LEAST_SIDE = 3
"""A map of fewer places each way shows nothing."""
AT_ONCE = 8
"""Images of one forward pass with gradients."""


def saliency(chain: Chain, images_BCHW: Tensor, class_B: Tensor) -> Tensor | None:
    """Maps (B, h, w) in [0, 1] of what spoke for each image's class. None where the network keeps no map between two of its blocks, or
    where the device has no room for one image with gradients.

    The map is the sum over channels of the features in front of the last block that takes a map, each channel weighted by the mean
    gradient of the class's logit, and nothing below zero. chain: in eval mode. images_BCHW: uint8 or in [0, 1], on the chain's device.
    """
    cut = None
    with contextlib.suppress(torch.OutOfMemoryError):
        cut = _last_map(chain, images_BCHW[:1])
    if cut is None:
        return None
    for size in (AT_ONCE, 1):
        with contextlib.suppress(torch.OutOfMemoryError):  # a picture in a report ends no run
            parts = zip(images_BCHW.split(size), class_B.split(size), strict=True)
            return torch.cat([_maps(chain, cut, *part) for part in parts])
    return None


def _maps(chain: Chain, cut: int, images_BCHW: Tensor, class_B: Tensor) -> Tensor:
    with torch.no_grad():
        features = chain.forward(images_BCHW, stop=cut)  # not __call__, which may be compiled
    features.requires_grad_()
    with torch.enable_grad():
        score = chain.forward(features, start=cut).gather(1, class_B[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, features)
    shown, slope = as_map(features.detach()), as_map(gradient)
    assert shown is not None
    assert slope is not None
    cam_Bhw = (slope.float().mean((1, 2), keepdim=True) * shown.float()).sum(-1).clamp_min(0)
    return (cam_Bhw / cam_Bhw.amax((1, 2), keepdim=True).clamp_min(1e-12)).cpu()


def lit(pixels_HWC: np.ndarray, map_hw: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8, darkened where the map is low. map_hw: in [0, 1], of any size."""
    height, width = pixels_HWC.shape[:2]
    light = Image.fromarray((255 * map_hw).round().astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    share_HW1 = 0.15 + 0.85 * np.asarray(light, dtype=np.float32)[..., None] / 255
    return (pixels_HWC * share_HW1).round().astype(np.uint8)


def _last_map(chain: Chain, image: Tensor) -> int | None:
    """The last block that takes a map: of channels, or of tokens that stand for patches."""
    if chain.runs_whole:
        return None
    last, features = None, image
    with torch.no_grad():
        for cut in range(1, len(chain.blocks)):
            features = chain.forward(features, start=cut - 1, stop=cut)
            shown = as_map(features)
            if shown is not None and min(shown.shape[1:3]) >= LEAST_SIDE:
                last = cut
    return last
