"""Strong views made in batches on the device that trains: the pixels that Pillow makes of the same draw, bit for bit.

Pillow resizes in integers (weights of 22 bits, first along rows, then along columns, rounded to uint8 in between) and turns in float64;
torch's single operations in these types are exact on every device. Hence nothing here may be compiled: fused operations round once less.
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

PIXELS, DRAWN = ".pixels", ".drawn"
"""What stands in a batch in place of "image": the base images' boxes, uint8 (P, 3), one after the other; and what was drawn, (B, N)."""

_BOX = ("start", "inner", "outer", "inner_step", "outer_step", "tall")
_COLUMN = {
    name: i
    for i, name in enumerate(
        (*_BOX, "flip", *"abcdef", *(f"op{i}" for i in range(3)), *(f"factor{i}" for i in range(3)), "size", "bicubic")
    )
}
"""Columns of DRAWN, float64.

Each box is resized along its inner axis first: along x, or along y where Pillow does so (tall). start: the number of its first pixel.
inner, outer: its lengths. inner_step, outer_step: how many pixels further the next one along that axis stands. a to f: from a place in the
view to one in the resized box. op and factor: of the jitter, in order. size: the view's side.
"""
BRIGHTNESS, CONTRAST, SATURATION = range(3)
"""The operations, as torchvision's ColorJitter numbers them."""

_BITS = 22  # of Pillow's weights, PRECISION_BITS in its Resample.c
_AT_ONCE = 64  # views that are made together: what it takes does not grow with the batch


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one strong view."""

    top: int
    left: int
    height: int
    width: int
    """The box of the base image that is resized to the view."""
    flip: bool = False
    angle: float = 0.0
    """Degrees, counterclockwise, about the centre."""
    jitter: tuple[tuple[int, float], ...] = ()
    """Operations and their factors, in order."""


def packed(boxes: Sequence[np.ndarray], drawn: Sequence[Drawn], size: int, bicubic: bool) -> tuple[Tensor, Tensor]:
    """(PIXELS, DRAWN) of a batch. boxes: uint8 (height, width, 3) each, as cut from the base images. size: the view's side, pixels."""
    rows, start = [], 0
    for box, one in zip(boxes, drawn, strict=True):
        height, width = box.shape[:2]
        tall = height > size and height - size > 2 * (width - size) and tall_from_above()
        axes = (height, width, width, 1) if tall else (width, height, 1, width)
        jitter = (*one.jitter, *[(BRIGHTNESS, 1.0)] * (3 - len(one.jitter)))  # brightness by 1 leaves an image as it is
        ops, factors = zip(*jitter, strict=True)
        rows.append((start, *axes, tall, one.flip, *_turn(one.angle, size), *ops, *factors, size, bicubic))
        start += height * width
    return torch.from_numpy(np.concatenate([box.reshape(-1, 3) for box in boxes])), torch.tensor(rows, dtype=torch.float64)


@cache
def tall_from_above() -> bool:
    """Whether this Pillow resizes along y first where y shrinks by more than twice as many pixels as x does. From 13.0 on it does."""
    tall = Image.fromarray(np.random.PCG64(0).random_raw(3 * 48 * 18).astype(np.uint8).reshape(48, 18, 3))
    how = Image.Resampling.BILINEAR
    return tall.resize((16, 16), how) == tall.resize((18, 16), how).resize((16, 16), how)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch of the loader on the device; images that are still to be made are made there. The host does not wait for it."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    for name in [name.removesuffix(PIXELS) for name in batch if name.endswith(PIXELS)]:
        moved[name] = _render(moved.pop(name + PIXELS), moved.pop(name + DRAWN), batch[name + DRAWN])
    return moved


def _render(pixels_P3: Tensor, drawn_BN: Tensor, host_BN: Tensor) -> Tensor:
    """uint8 (B, 3, S, S). host_BN: the same as drawn_BN on the host, so that shapes are known there.

    What a sample becomes does not depend on the others: they only add weights of zero to its sums of integers.
    """
    parts = zip(drawn_BN.split(_AT_ONCE), host_BN.split(_AT_ONCE), strict=True)
    return torch.cat([_render_some(pixels_P3, part, host) for part, host in parts])


def _render_some(pixels_P3: Tensor, drawn_BN: Tensor, host_BN: Tensor) -> Tensor:
    size, bicubic = int(host_BN[0, _COLUMN["size"]]), bool(host_BN[0, _COLUMN["bicubic"]])
    longest = {axis: int(host_BN[:, _COLUMN[axis]].max()) for axis in ("inner", "outer")}
    column = {name: drawn_BN[:, i] for name, i in _COLUMN.items()}
    box = {name: column[name].to(torch.int32).view(-1, 1, 1) for name in _BOX}
    tall_B11, flip_B = box["tall"] > 0, column["flip"] > 0

    # Along the inner axis. A box that is shorter than the longest repeats its last row: nothing looks at it.
    first_BS, weights_BSK = _weights(column["inner"], size, longest["inner"], bicubic, flip_B & (column["tall"] == 0))
    outer_H1 = torch.arange(longest["outer"], dtype=torch.int32, device=pixels_P3.device).view(-1, 1)
    begin_BH1 = box["start"] + outer_H1.minimum(box["outer"] - 1) * box["outer_step"]
    resized_BHSC = _sum(pixels_P3, begin_BH1, box["inner_step"], first_BS[:, None], weights_BSK[:, None], box["inner"])

    # Along the outer one, from places (image, outer, inner); where the box is tall, the outer target is the column of the view.
    first_BS, weights_BSK = _weights(column["outer"], size, longest["outer"], bicubic, flip_B & (column["tall"] > 0))
    first_BSS = torch.where(tall_B11, first_BS[:, None], first_BS[:, :, None])
    weights_BSSK = torch.where(tall_B11[..., None], weights_BSK[:, None], weights_BSK[:, :, None])
    target_S = torch.arange(size, dtype=torch.int32, device=pixels_P3.device)
    image_B11 = torch.arange(len(drawn_BN), dtype=torch.int32, device=pixels_P3.device).view(-1, 1, 1) * (longest["outer"] * size)
    begin_BSS = image_B11 + torch.where(tall_B11, target_S[:, None], target_S)
    view_BSSC = _sum(resized_BHSC.view(-1, 3), begin_BSS, size, first_BSS, weights_BSSK, box["outer"])

    view_BSSC = _turned(view_BSSC, torch.stack([column[name] for name in "abcdef"]))
    return _jittered(view_BSSC.permute(0, 3, 1, 2).contiguous(), column)


def _weights(length_B: Tensor, size: int, longest: int, bicubic: bool, mirrored_B: Tensor) -> tuple[Tensor, Tensor]:
    """(the first source place of each target place (B, S), Pillow's weights of it and those after it (B, S, K)), int32 both.

    Where mirrored, the targets stand from the last to the first. As precompute_coeffs and normalize_coeffs_8bpc of Pillow's Resample.c,
    in the order of their operations.
    """
    length_B11, side = length_B.view(-1, 1, 1), torch.full((), float(size), dtype=torch.float64, device=length_B.device)
    scale = length_B11 / side  # by a tensor: by a number, CUDA would multiply by its reciprocal
    filterscale = scale.clamp(min=1.0)
    radius = 2.0 if bicubic else 1.0
    support, ss = filterscale * radius, filterscale.reciprocal()
    x_S1 = torch.arange(size, dtype=torch.float64, device=length_B.device).view(-1, 1)
    center = (x_S1 + 0.5) * scale
    first = ((center - support) + 0.5).trunc().clamp(min=0.0)
    end = ((center + support) + 0.5).trunc().minimum(length_B11)
    most = math.ceil(2 * radius * max(longest / size, 1.0))  # no more places lie within the support
    source = first + torch.arange(most, dtype=torch.float64, device=length_B.device)
    weights = _filter(((source - center) + 0.5) * ss, bicubic)
    weights = weights.masked_fill_(source >= end, 0.0)
    total = weights[..., 0].clone()
    for k in range(1, most):
        total = total + weights[..., k]
    scaled = (weights / total[..., None]) * float(1 << _BITS)
    rounded = torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).to(torch.int32)
    first_BS, weights_BSK = first[..., 0].to(torch.int32), rounded.masked_fill_(source >= end, 0)
    turned_B1 = mirrored_B[:, None]
    return torch.where(turned_B1, first_BS.flip(1), first_BS), torch.where(turned_B1[..., None], weights_BSK.flip(1), weights_BSK)


def _filter(x: Tensor, bicubic: bool) -> Tensor:
    """Pillow's triangle, or its cubic with a = -0.5."""
    x = x.abs()
    if not bicubic:
        return (1.0 - x).clamp(min=0.0)
    near, far = ((1.5 * x - 2.5) * x) * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return torch.where(x < 1.0, near, far.masked_fill_(x >= 2.0, 0.0))


def _sum(source_P3: Tensor, begin: Tensor, step: Tensor | int, first: Tensor, weights: Tensor, length: Tensor) -> Tensor:
    """uint8 (B, ., ., 3): sums of the pixels number begin + step * (first + k), weighted. length: what first + k stays below."""
    total = None
    for k in range(weights.shape[-1]):
        place = begin + (first + k).minimum(length - 1) * step  # beyond the last one the weight is zero
        part = _at(source_P3, place).to(torch.int32) * weights[..., k, None]
        total = part + (1 << (_BITS - 1)) if total is None else total.add_(part)
    assert total is not None
    return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


def _at(source_P3: Tensor, place: Tensor) -> Tensor:
    """(*place.shape, 3)."""
    return source_P3.index_select(0, place.flatten()).view(*place.shape, 3)


def _turned(view_BSSC: Tensor, affine_6B: Tensor) -> Tensor:
    """Pillow's bilinear transform (bilinear_filter32RGB of its Geometry.c), black where it looks outside."""
    num, size = view_BSSC.shape[:2]
    a, b, c, d, e, f = affine_6B[:, :, None, None]
    at = torch.arange(size, dtype=torch.float64, device=view_BSSC.device) + 0.5
    x, y = (a * at + b * at[:, None]) + c, (d * at + e * at[:, None]) + f
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    x, y = x - 0.5, y - 0.5
    x0, y0 = x.floor(), y.floor()
    dx, dy = (x - x0)[..., None], (y - y0)[..., None]
    image_B11 = torch.arange(num, dtype=torch.int32, device=view_BSSC.device).view(-1, 1, 1) * (size * size)
    left, right = (place.to(torch.int32).clamp_(0, size - 1) for place in (x0, x0 + 1))
    above, below = (image_B11 + place.to(torch.int32).clamp_(0, size - 1) * size for place in (y0, y0 + 1))
    pixels_P3 = view_BSSC.view(-1, 3)

    def along(row: Tensor) -> Tensor:
        one, other = (_at(pixels_P3, row + place).double() for place in (left, right))
        return other.sub_(one).mul_(dx).add_(one)

    upper, lower = along(above), along(below)
    return lower.sub_(upper).mul_(dy).add_(upper).to(torch.uint8).masked_fill_(~inside[..., None], 0)


def _jittered(view_BCHW: Tensor, column: dict[str, Tensor]) -> Tensor:
    """Pillow's ImageEnhance: each operation blends with black, with the mean grey, or with the grey image, and cuts off to uint8."""
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


def _grey(view_BCHW: Tensor) -> Tensor:
    """int32 (B, 1, H, W): Pillow's L24 of its Convert.c."""
    red, green, blue = view_BCHW.to(torch.int32).split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _turn(angle: float, size: int) -> tuple[float, ...]:
    """The affine map of Image.rotate about the centre: six numbers."""
    radians, center = -math.radians(angle % 360.0), size / 2
    cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
    other = round(-math.sin(radians), 15)
    return cos, sin, (cos * -center + sin * -center + 0.0) + center, other, cos, (other * -center + cos * -center + 0.0) + center
