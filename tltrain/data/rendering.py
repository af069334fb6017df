"""Batched augmentation on the training device: strong views with the same pixels as Pillow's, bit for bit.

Pillow resizes in integers: weights of 22 bits, first along rows, then along columns, rounded to uint8 in between. It rotates in float64.
Single torch operations in these types give the same result on every device. Code here must not be compiled, because fused operations
round less often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tltrain.data.augmentation import affine, erasing

PIXELS, DRAWN = ".pixels", ".drawn"
"""Suffixes of the batch entries in place of "image": all crop boxes' pixels, uint8 (P, 3), and the drawn parameters (B, N)."""

_BOX = ("start", "inner", "outer", "inner_step", "outer_step", "tall")
_ERASED = ("erased_top", "erased_left", "erased_bottom", "erased_right")
_COLUMN = {
    name: i
    for i, name in enumerate(
        (
            *_BOX,
            "flip",
            *"abcdef",
            "margin",
            "mirror",
            *(f"op{i}" for i in range(3)),
            *(f"factor{i}" for i in range(3)),
            *_ERASED,
            "size",
            "bicubic",
        )
    )
}
"""Columns of DRAWN, float64.

Each box is resized along its inner axis first: x, or y where Pillow does so (tall). start: index of its first pixel in PIXELS.
inner, outer: its lengths along the two axes. inner_step, outer_step: strides along them, in pixels. a to f: affine map from view
coordinates to the resized box, padded by margin pixels on each side: by its reflection (mirror), or by its edge. op and factor: colour
jitter operations, in order. erased: a rectangle that gets the view's mean colour. size: side of the view.
"""
BRIGHTNESS, CONTRAST, SATURATION = range(3)
"""Colour operations, numbered as in torchvision's ColorJitter."""

_BITS = 22  # of Pillow's weights, PRECISION_BITS in its Resample.c
_CHUNK = 64  # views rendered together, so that memory does not grow with the batch


@dataclass(frozen=True)
class Drawn:
    """The random parameters of one strong view."""

    top: int
    left: int
    height: int
    width: int
    """Size of the crop box in the base image, which is resized to the view."""
    flip: bool = False
    angle: float = 0.0
    """Degrees, counterclockwise, about the centre."""
    mirror: bool = False
    """What the turn leaves open: as in `affine.warped`."""
    jitter: tuple[tuple[int, float], ...] = ()
    """Operations and their factors, in order."""
    erased: erasing.Box = erasing.NOTHING


def pack(boxes: Sequence[np.ndarray], drawn: Sequence[Drawn], size: int, bicubic: bool) -> tuple[Tensor, Tensor]:
    """The tensors PIXELS and DRAWN of a batch. boxes: uint8 (height, width, 3) crops of the base images. size: side of the view, pixels."""
    rows, start = [], 0
    for box, params in zip(boxes, drawn, strict=True):
        height, width = box.shape[:2]
        tall = height > size and height - size > 2 * (width - size) and tall_from_above()
        axes = (height, width, width, 1) if tall else (width, height, 1, width)
        jitter = (*params.jitter, *[(BRIGHTNESS, 1.0)] * (3 - len(params.jitter)))  # brightness by 1 changes nothing
        ops, factors = zip(*jitter, strict=True)
        margin, map_ = affine.padded(affine.rotation(params.angle, size), size)
        turn = (*map_, margin, params.mirror)
        rows.append((start, *axes, tall, params.flip, *turn, *ops, *factors, *params.erased, size, bicubic))
        start += height * width
    return torch.from_numpy(np.concatenate([box.reshape(-1, 3) for box in boxes])), torch.tensor(rows, dtype=torch.float64)


@cache
def tall_from_above() -> bool:
    """Whether this Pillow resizes along y first where y shrinks by more than twice as many pixels as x. Pillow 13.0 and newer do."""
    tall = Image.fromarray(np.random.PCG64(0).random_raw(3 * 48 * 18).astype(np.uint8).reshape(48, 18, 3))
    how = Image.Resampling.BILINEAR
    return tall.resize((16, 16), how) == tall.resize((18, 16), how).resize((16, 16), how)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a loader batch to the device, and render strong views there. The copy and the rendering are asynchronous."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    for name in [name.removesuffix(PIXELS) for name in batch if name.endswith(PIXELS)]:
        moved[name] = _render(moved.pop(name + PIXELS), moved.pop(name + DRAWN), batch[name + DRAWN])
    return moved


def _render(pixels_P3: Tensor, drawn_BN: Tensor, host_BN: Tensor) -> Tensor:
    """Views, uint8 (B, 3, S, S). host_BN: a copy of drawn_BN on the host, which gives shapes without waiting for the device.

    A view does not depend on the rest of its batch: the others only add weights of zero to its integer sums.
    """
    parts = zip(drawn_BN.split(_CHUNK), host_BN.split(_CHUNK), strict=True)
    return torch.cat([_render_some(pixels_P3, part, host) for part, host in parts])


def _render_some(pixels_P3: Tensor, drawn_BN: Tensor, host_BN: Tensor) -> Tensor:
    size, bicubic = int(host_BN[0, _COLUMN["size"]]), bool(host_BN[0, _COLUMN["bicubic"]])
    longest = {axis: int(host_BN[:, _COLUMN[axis]].max()) for axis in ("inner", "outer")}
    column = {name: drawn_BN[:, i] for name, i in _COLUMN.items()}
    box = {name: column[name].to(torch.int32).view(-1, 1, 1) for name in _BOX}
    tall_B11, flip_B = box["tall"] > 0, column["flip"] > 0

    # Resize along the inner axis. A box shorter than the longest repeats its last row, which is never read.
    first_BS, weights_BSK = _weights(column["inner"], size, longest["inner"], bicubic, flip_B & (column["tall"] == 0))
    outer_H1 = torch.arange(longest["outer"], dtype=torch.int32, device=pixels_P3.device).view(-1, 1)
    begin_BH1 = box["start"] + outer_H1.minimum(box["outer"] - 1) * box["outer_step"]
    resized_BHSC = _sum(pixels_P3, begin_BH1, box["inner_step"], first_BS[:, None], weights_BSK[:, None], box["inner"])

    # Resize along the outer axis, from indices (image, outer, inner); where the box is tall, the outer target is the column of the view.
    first_BS, weights_BSK = _weights(column["outer"], size, longest["outer"], bicubic, flip_B & (column["tall"] > 0))
    first_BSS = torch.where(tall_B11, first_BS[:, None], first_BS[:, :, None])
    weights_BSSK = torch.where(tall_B11[..., None], weights_BSK[:, None], weights_BSK[:, :, None])
    target_S = torch.arange(size, dtype=torch.int32, device=pixels_P3.device)
    image_B11 = torch.arange(len(drawn_BN), dtype=torch.int32, device=pixels_P3.device).view(-1, 1, 1) * (longest["outer"] * size)
    begin_BSS = image_B11 + torch.where(tall_B11, target_S[:, None], target_S)
    view_BSSC = _sum(resized_BHSC.view(-1, 3), begin_BSS, size, first_BSS, weights_BSSK, box["outer"])

    view_BSSC = _rotated(view_BSSC, torch.stack([column[name] for name in "abcdef"]), column["margin"], column["mirror"])
    view_BCHW = _jittered(view_BSSC.permute(0, 3, 1, 2).contiguous(), column)
    return _erased(view_BCHW, column) if bool(host_BN[:, _COLUMN["erased_bottom"]].any()) else view_BCHW


def _weights(length_B: Tensor, size: int, longest: int, bicubic: bool, mirrored_B: Tensor) -> tuple[Tensor, Tensor]:
    """(first source index of each target index (B, S), Pillow's weights from there on (B, S, K)), both int32.

    Mirrored samples have their targets in reverse order. Same operations in the same order as precompute_coeffs and
    normalize_coeffs_8bpc of Pillow's Resample.c.
    """
    length_B11, side = length_B.view(-1, 1, 1), torch.full((), float(size), dtype=torch.float64, device=length_B.device)
    scale = length_B11 / side  # divide by a tensor: for a Python number, CUDA would multiply by its reciprocal
    filterscale = scale.clamp(min=1.0)
    radius = 2.0 if bicubic else 1.0
    support, ss = filterscale * radius, filterscale.reciprocal()
    x_S1 = torch.arange(size, dtype=torch.float64, device=length_B.device).view(-1, 1)
    center = (x_S1 + 0.5) * scale
    first = ((center - support) + 0.5).trunc().clamp(min=0.0)
    end = ((center + support) + 0.5).trunc().minimum(length_B11)
    most = math.ceil(2 * radius * max(longest / size, 1.0))  # the largest number of source pixels within the support
    source = first + torch.arange(most, dtype=torch.float64, device=length_B.device)
    weights = _filter(((source - center) + 0.5) * ss, bicubic)
    weights = weights.masked_fill_(source >= end, 0.0)
    total = weights[..., 0].clone()
    for k in range(1, most):
        total = total + weights[..., k]
    scaled = (weights / total[..., None]) * float(1 << _BITS)
    rounded = torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).to(torch.int32)
    first_BS, weights_BSK = first[..., 0].to(torch.int32), rounded.masked_fill_(source >= end, 0)
    mirrored_B1 = mirrored_B[:, None]
    return torch.where(mirrored_B1, first_BS.flip(1), first_BS), torch.where(mirrored_B1[..., None], weights_BSK.flip(1), weights_BSK)


def _filter(x: Tensor, bicubic: bool) -> Tensor:
    """Pillow's triangle filter, or its cubic filter with a = -0.5."""
    x = x.abs()
    if not bicubic:
        return (1.0 - x).clamp(min=0.0)
    near, far = ((1.5 * x - 2.5) * x) * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return torch.where(x < 1.0, near, far.masked_fill_(x >= 2.0, 0.0))


def _sum(source_P3: Tensor, begin: Tensor, step: Tensor | int, first: Tensor, weights: Tensor, length: Tensor) -> Tensor:
    """Weighted sums of the pixels begin + step * (first + k), uint8 (B, ., ., 3). length: upper bound (exclusive) of first + k."""
    total = None
    for k in range(weights.shape[-1]):
        index = begin + (first + k).minimum(length - 1) * step  # beyond the last pixel the weight is zero
        part = _gather(source_P3, index).to(torch.int32) * weights[..., k, None]
        total = part + (1 << (_BITS - 1)) if total is None else total.add_(part)
    assert total is not None
    return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


def _gather(source_P3: Tensor, index: Tensor) -> Tensor:
    """The pixels at these indices (*index.shape, 3)."""
    return source_P3.index_select(0, index.flatten()).view(*index.shape, 3)


def _rotated(view_BSSC: Tensor, affine_6B: Tensor, margin_B: Tensor, mirror_B: Tensor) -> Tensor:
    """Pillow's bilinear affine transform (bilinear_filter32RGB of its Geometry.c) of the padded view, from indices into the view itself."""
    num, size = view_BSSC.shape[:2]
    a, b, c, d, e, f = affine_6B[:, :, None, None]
    at = torch.arange(size, dtype=torch.float64, device=view_BSSC.device) + 0.5
    x, y = (a * at + b * at[:, None]) + c, (d * at + e * at[:, None]) + f
    x, y = x - 0.5, y - 0.5
    x0, y0 = x.floor(), y.floor()
    dx, dy = (x - x0)[..., None], (y - y0)[..., None]
    image_B11 = torch.arange(num, dtype=torch.int32, device=view_BSSC.device).view(-1, 1, 1) * (size * size)
    margin_B11, mirror_B11, last = margin_B[:, None, None], mirror_B[:, None, None] > 0, size - 1

    def unpadded(place: Tensor) -> Tensor:
        place = (place - margin_B11).to(torch.int32)
        return torch.where(mirror_B11, last - (last - place.abs()).abs(), place).clamp_(0, last)

    left, right = (unpadded(place) for place in (x0, x0 + 1))
    above, below = (image_B11 + unpadded(place) * size for place in (y0, y0 + 1))
    pixels_P3 = view_BSSC.view(-1, 3)

    def interpolate_row(row: Tensor) -> Tensor:
        left_pixel, right_pixel = (_gather(pixels_P3, row + column).double() for column in (left, right))
        return right_pixel.sub_(left_pixel).mul_(dx).add_(left_pixel)

    upper, lower = interpolate_row(above), interpolate_row(below)
    return lower.sub_(upper).mul_(dy).add_(upper).to(torch.uint8)


def _jittered(view_BCHW: Tensor, column: dict[str, Tensor]) -> Tensor:
    """Pillow's ImageEnhance: each operation blends with black, with the mean grey or with the grey image, and clips to uint8."""
    for i in range(3):
        op, factor = column[f"op{i}"].view(-1, 1, 1, 1), column[f"factor{i}"].view(-1, 1, 1, 1).float()
        grey_B1HW = _grey(view_BCHW)
        count = grey_B1HW[0].numel()
        mean_B111 = (2 * grey_B1HW.sum((1, 2, 3), keepdim=True, dtype=torch.int64) + count).div(2 * count, rounding_mode="floor")
        flat_B111 = mean_B111.to(torch.int32).masked_fill_(op != CONTRAST, 0)
        other = torch.where(op == SATURATION, grey_B1HW, flat_B111).float()
        blended = view_BCHW.float().sub_(other).mul_(factor).add_(other)
        view_BCHW = blended.clamp_(0, 255).to(torch.uint8)
    return view_BCHW


def _erased(view_BCHW: Tensor, column: dict[str, Tensor]) -> Tensor:
    """`erasing.erase`, with the same means."""
    count = view_BCHW[0, 0].numel()
    mean_BC11 = (2 * view_BCHW.sum((2, 3), keepdim=True, dtype=torch.int64) + count).div(2 * count, rounding_mode="floor")
    top, left, bottom, right = (column[name].view(-1, 1, 1, 1) for name in _ERASED)
    at = torch.arange(view_BCHW.shape[-1], device=view_BCHW.device)
    inside = (at[:, None] >= top) & (at[:, None] < bottom) & (at >= left) & (at < right)
    return torch.where(inside, mean_BC11.to(torch.uint8), view_BCHW)


def _grey(view_BCHW: Tensor) -> Tensor:
    """Grey values, int32 (B, 1, H, W), as L24 of Pillow's Convert.c."""
    red, green, blue = view_BCHW.to(torch.int32).split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
