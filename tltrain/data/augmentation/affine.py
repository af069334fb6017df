"""Turns, shears and shifts of an image that leave no black corners: what lies beyond its edge is filled from the image itself.

An affine map is six numbers (a, b, c, d, e, f), as Pillow has them: the pixel at (x, y) of the result comes from (a x + b y + c,
d x + e y + f) of the image, in pixels from its top left corner.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

Map = tuple[float, float, float, float, float, float]


def rotation(angle: float, size: int) -> Map:
    """A turn about the centre of a square image. angle: degrees, counterclockwise. The same numbers as in Pillow's Image.rotate."""
    radians, center = -math.radians(angle % 360.0), size / 2
    cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
    other = round(-math.sin(radians), 15)
    return cos, sin, (cos * -center + sin * -center + 0.0) + center, other, cos, (other * -center + cos * -center + 0.0) + center


def padded(map_: Map, size: int) -> tuple[int, Map]:
    """(how many pixels beyond a square image of side `size` a map reads, the map from an image that is padded by that many)."""
    a, b, c, d, e, f = map_
    corners = [(x, y) for x in (0, size) for y in (0, size)]
    read = [place for x, y in corners for place in (a * x + b * y + c, d * x + e * y + f)]
    margin = 1 + math.ceil(max(-min(read), max(read) - size, 0.0))  # 1: bilinear interpolation reads the pixel beside
    return margin, (a, b, c + margin, d, e, f + margin)


def warped(image: Image.Image, map_: Map, mirror: bool) -> Image.Image:
    """A square RGB image through an affine map, interpolated bilinearly.

    Beyond the edge the image is reflected about its outermost pixels. mirror=False: these pixels are repeated, since a reflection would
    show mirrored letters.
    """
    margin, map_ = padded(map_, image.width)
    around = ((margin, margin), (margin, margin), (0, 0))
    pixels_HWC = np.pad(np.asarray(image), around, mode="reflect" if mirror else "edge")
    return Image.fromarray(pixels_HWC).transform(image.size, Image.Transform.AFFINE, map_, Image.Resampling.BILINEAR)
