"""One image file to RGB pixels as a person would see them."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tltrain.errors import UserError

MAX_ASPECT = 50
"""Longer side over shorter side; beyond it, resizing the shorter side would need gigabytes."""


def decode(content: bytes) -> Image.Image:
    """RGB image from a file's bytes: EXIF rotation applied, transparency on white, 16 bits scaled to 8.

    Raises whatever Pillow raises for bytes it cannot read (OSError, ValueError, SyntaxError, ...).
    """
    with Image.open(io.BytesIO(content)) as image:
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels; the sides may differ by a factor of {MAX_ASPECT} at most")
        image.load()
        return to_rgb(ImageOps.exif_transpose(image), image.format)


def to_rgb(image: Image.Image, file_format: str | None = None) -> Image.Image:
    """RGB from any mode of Pillow, transparency on white. Raises ValueError for a mode whose white is not known."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        image = _from_16_bit(image)
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} (32 bits) have no known white; save the image with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "1":
        image = image.convert("L")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def read_image(path: Path, tries: int = 3, wait_s: float = 0.2) -> Image.Image:
    """RGB image from a file that was readable when the data was scanned. Tried again, each time after a longer wait; then UserError."""
    for attempt in range(tries):
        try:
            return decode(path.read_bytes())
        except Exception as error:  # Pillow has no common base for what a broken file makes it raise
            problem = describe(error)
        if attempt + 1 < tries:
            time.sleep(wait_s * 4**attempt)
    raise UserError(
        f"{path} could be read when the data was scanned, and now cannot: {problem} (tried {tries} times); "
        "nothing is put in its place: mend the file or the disk and start again"
    )


def describe(error: Exception) -> str:
    """One line; Pillow's own text names a buffer, not a file."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}" or type(error).__name__


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey with 8 bits, from 0 to 65535; Pillow's own conversion clips everything above 255 to white."""
    pixels_HW = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((pixels_HW + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    grey.putalpha(Image.fromarray(np.where(pixels_HW == transparent, 0, 255).astype(np.uint8)))
    return grey
