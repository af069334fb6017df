"""A synthetic source task: printed characters, distorted to look like handwriting.

Characters of matplotlib's fonts are rendered once, as signed distances to their outline. An image warps one of them by rotation, shear,
perspective, elastic deformation and stroke width. The box around the ink becomes a 32 x 32 bitmap, and each pixel counts the ink of a
4 x 4 block, as in scikit-learn's digits (Alpaydin and Kaynak 1998).

An image is a pure function of (seed, number): its random numbers are hashes of (seed, number, slot).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt

from tltrain.data.dataset import Source, SourceKind

NUM_IMAGES = 40_000
SEED = 0
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip

SIDE = 8
"""Side of an image, pixels, as in scikit-learn's digits."""
_FIELD, _GLYPH = 64, 36  # side of a character's distance field, and the character's height in it
_FRAME, _INK = 44, 32  # side of the frame it is warped into, and of the bitmap whose 4 x 4 blocks are counted
_SLOTS, _KNOTS, _CHUNK = 64, 4, 512  # random numbers of an image, control points of the bend a side, images rendered at a time

# Strength of each distortion; lengths in pixels of the field.
_ROTATION, _SHEAR, _PERSPECTIVE, _ELASTIC = 0.2, 0.3, 0.25, 5.0  # radians, tangent, tilt, reach
_STRETCH, _NARROW = 0.25, 0.15  # log of the width's random stretch, and of a fixed one: handwriting is narrower than print
_PEN, _THINNER, _THICKER = (2.2, 4.4), 0.5, 4.0  # half the pen's width, and how far an outline may move to come to it

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PrintedReader:
    """Reads images of one seed, rendered in chunks on first use. Pickled as the seed."""

    seed: int
    chunks: dict[int, NDArray[np.uint8]] = field(default_factory=dict, compare=False)

    def __call__(self, number: int) -> Image.Image:
        chunk, position = divmod(number, _CHUNK)
        if chunk not in self.chunks:
            numbers_N = np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK)
            self.chunks[chunk] = np.round(render_batch(numbers_N, self.seed) * (255 / 16)).astype(np.uint8)
        return Image.fromarray(self.chunks[chunk][position]).convert("RGB")

    def __getstate__(self) -> dict[str, object]:
        return {"seed": self.seed, "chunks": {}}


def open_printed() -> Source:
    """40,000 images of 8 x 8 pixels, 36 classes (0 to 9, A to Z). Only the first chunk is rendered now."""
    numbers_N = np.arange(NUM_IMAGES, dtype=np.int64)
    labels_N = labels(numbers_N, SEED)
    # the first chunk stands for all: it changes with the renderer, the fonts and the libraries
    content = hashlib.blake2b(render_batch(numbers_N[:_CHUNK], SEED).tobytes() + labels_N.tobytes(), digest_size=16).hexdigest()
    ids = tuple(f"printed/{i}" for i in numbers_N)
    declared = np.full(NUM_IMAGES, "train")
    read = PrintedReader(SEED)
    return Source(tuple(CHARACTERS), labels_N, ids, numbers_N, declared, numbers_N, read, f"printed-{content}", in_memory=True)


def classes() -> tuple[str, ...]:
    """The source task's classes, in label order."""
    return tuple(CHARACTERS)


def labels(numbers_N: Ints, seed: int) -> Ints:
    """The class (N,) of each image."""
    return _choice(_uniforms(numbers_N, seed)[:, 0], len(CHARACTERS))


def render(number: int, seed: int) -> NDArray[np.uint8]:
    """One image (8, 8), grey from 0 to 16."""
    return render_batch(np.array([number]), seed)[0]


def render_batch(numbers_N: Ints, seed: int) -> NDArray[np.uint8]:
    """Images (N, 8, 8), grey from 0 to 16. Each is independent of the rest of the batch."""
    return np.concatenate([_render(_uniforms(numbers_N[i : i + _CHUNK], seed)) for i in range(0, len(numbers_N), _CHUNK)])


def _render(u_NS: Floats) -> NDArray[np.uint8]:
    num = len(u_NS)
    which_N = _choice(u_NS[:, 1], len(FONTS)) * len(CHARACTERS) + _choice(u_NS[:, 0], len(CHARACTERS))
    x_NHW, y_NHW = _warp(u_NS)
    half = np.float32((_FIELD - 1) / 2)
    signed_NHW = _sample(_glyphs(), which_N, x_NHW * half + half, y_NHW * half + half)
    signed_NHW = signed_NHW + _pen(signed_NHW, u_NS[:, 10])
    x_NHW, y_NHW = _box(signed_NHW > 0, u_NS)
    bitmap_NHW = _sample(signed_NHW, np.arange(num), x_NHW, y_NHW) > 0
    cell = _INK // SIDE
    return bitmap_NHW.reshape(num, SIDE, cell, SIDE, cell).sum(axis=(2, 4)).astype(np.uint8)


def _warp(u_NS: Floats) -> tuple[Floats, Floats]:
    """Source coordinates of each frame pixel in the field: x and y (N, FRAME, FRAME), from -1 to 1 around the field's centre."""
    num = len(u_NS)
    line_W = np.linspace(-1, 1, _FRAME, dtype=np.float32) * np.float32(_FRAME / _FIELD * 1.25)
    knots = (u_NS[:, 20 : 20 + 2 * _KNOTS * _KNOTS] * 2 - 1).reshape(num, 2, _KNOTS, _KNOTS)
    reach = np.float32(_ELASTIC * 2 / _FIELD)
    x_NHW = line_W[None, None, :] + reach * _bend(knots[:, 0])
    y_NHW = line_W[None, :, None] + reach * _bend(knots[:, 1])
    angle, shear = _spread(u_NS, 2, _ROTATION), _spread(u_NS, 4, _SHEAR)
    tilt = 1 + _spread(u_NS, 6, _PERSPECTIVE) * x_NHW + _spread(u_NS, 8, _PERSPECTIVE) * y_NHW
    x_NHW, y_NHW = x_NHW / tilt, y_NHW / tilt
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x_NHW + (sin + shear) * y_NHW, cos * y_NHW - sin * x_NHW


def _pen(signed_NHW: Floats, u_N: Floats) -> Floats:
    """Offset of each outline (N, 1, 1) that gives the stroke a random width."""
    num = len(signed_NHW)
    deepest = np.sort(signed_NHW.reshape(num, -1), axis=1)[:, -20].reshape(num, 1, 1)
    thin, thick = _PEN
    pen = np.float32(thin) + u_N.reshape(num, 1, 1) * np.float32(thick - thin)
    return np.clip(pen - deepest, -_THINNER, _THICKER).astype(np.float32)


def _box(ink_NHW: NDArray[np.bool_], u_NS: Floats) -> tuple[Floats, Floats]:
    """Source coordinates of each bitmap pixel in the frame, x and y (N, INK, INK): the box around the ink, scaled to full height."""
    num = len(ink_NHW)
    has_x, has_y = np.any(ink_NHW, axis=1), np.any(ink_NHW, axis=2)
    x0, x1 = has_x.argmax(axis=1), _FRAME - has_x[:, ::-1].argmax(axis=1)
    y0, y1 = has_y.argmax(axis=1), _FRAME - has_y[:, ::-1].argmax(axis=1)
    tall, wide = (y1 - y0).astype(np.float32), (x1 - x0).astype(np.float32)
    stretch = np.exp(_spread(u_NS, 12, _STRETCH) + np.float32(_NARROW)).reshape(num)
    scale_x = np.maximum(tall / _INK * stretch, wide / (_INK - 2))
    scale_y = tall / _INK
    cells = np.arange(_INK, dtype=np.float32) + 0.5 - _INK / 2
    x = ((x0 + x1) / 2 - 0.5)[:, None] + cells * scale_x[:, None] + (u_NS[:, 14] - 0.5)[:, None] * 4 * scale_x[:, None]
    y = ((y0 + y1) / 2 - 0.5)[:, None] + cells * scale_y[:, None]
    shape = (num, _INK, _INK)
    return np.broadcast_to(x[:, None, :], shape).astype(np.float32), np.broadcast_to(y[:, :, None], shape).astype(np.float32)


def _sample(fields: Floats, which_N: Ints, x_NHW: Floats, y_NHW: Floats) -> Floats:
    """Bilinear samples of fields[which] at pixel coordinates x, y."""
    side = fields.shape[-1]
    x, y = np.clip(x_NHW, 0, side - 1.001), np.clip(y_NHW, 0, side - 1.001)
    x0, y0 = x.astype(np.int32), y.astype(np.int32)
    dx, dy = x - x0, y - y0
    flat = fields.reshape(-1)
    at = which_N[:, None, None] * (side * side) + y0 * side + x0
    upper = flat[at] * (1 - dx) + flat[at + 1] * dx
    lower = flat[at + side] * (1 - dx) + flat[at + side + 1] * dx
    result: Floats = upper * (1 - dy) + lower * dy
    return result


def _bend(knots_NKK: Floats) -> Floats:
    """Control values interpolated smoothly over the frame (N, FRAME, FRAME)."""
    at_F = np.linspace(0, _KNOTS - 1, _FRAME, dtype=np.float32)
    bumps_FK = np.exp(-((at_F[:, None] - np.arange(_KNOTS, dtype=np.float32)) ** 2) / 0.8)
    bumps_FK = (bumps_FK / bumps_FK.sum(axis=1, keepdims=True)).astype(np.float32)
    # sums in a fixed order, not a matrix product: an image must not depend on what else is in its batch
    rows_NFK = np.sum([knots_NKK[:, k, None, :] * bumps_FK[:, k, None] for k in range(_KNOTS)], axis=0)
    bent: Floats = np.sum([rows_NFK[:, :, None, k] * bumps_FK[:, k] for k in range(_KNOTS)], axis=0)
    return bent


@cache
def _glyphs() -> Floats:
    """(fonts x characters, FIELD, FIELD): signed distance to the outline, positive in the ink."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 96) for name in FONTS]
    masks = [_mask(font, character) for font in fonts for character in CHARACTERS]
    return np.stack([distance_transform_edt(mask) - distance_transform_edt(~mask) for mask in masks]).astype(np.float32)


def _mask(font: ImageFont.FreeTypeFont, character: str) -> NDArray[np.bool_]:
    """The ink of a character (FIELD, FIELD), GLYPH pixels high and centred."""
    left, top, right, bottom = (int(v) for v in font.getbbox(character))
    ink = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(ink).text((-left, -top), character, fill=255, font=font)
    ink = ink.crop(ink.getbbox())
    width = max(2, min(_FIELD - 8, round(_GLYPH * ink.width / ink.height)))
    centred = Image.new("L", (_FIELD, _FIELD), 0)
    centred.paste(ink.resize((width, _GLYPH), Image.Resampling.BOX), ((_FIELD - width) // 2, (_FIELD - _GLYPH) // 2))
    return np.asarray(centred) >= 128


def _choice(u_N: Floats, num: int) -> Ints:
    return np.minimum((u_N * num).astype(np.int64), num - 1)


def _spread(u_NS: Floats, slot: int, width: float) -> Floats:
    """A symmetric, roughly normal random number for each image (N, 1, 1), within 2 `width` of zero. Uses two slots."""
    return ((u_NS[:, slot] + u_NS[:, slot + 1] - 1) * np.float32(width * 2)).reshape(len(u_NS), 1, 1)


def _uniforms(numbers_N: Ints, seed: int) -> Floats:
    """(N, SLOTS) uniform numbers in [0, 1)."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = _mix(np.full(1, seed, np.uint64) + step)
        row_N = _mix((numbers_N.astype(np.uint64) + np.uint64(1)) * step ^ key)
        slot_S = (np.arange(_SLOTS, dtype=np.uint64) + np.uint64(1)) * step
        bits_NS = _mix(row_N[:, None] + slot_S)
    return ((bits_NS >> np.uint64(40)).astype(np.float64) / 2.0**24).astype(np.float32)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


PRINTED = SourceKind(lambda argument, spec, root: open_printed())
