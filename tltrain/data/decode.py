"""Decodes one image file to RGB as a viewer shows it: EXIF orientation, colour profile, transparency, 16 bits."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from tltrain.core.errors import UserError
from tltrain.core.files import read_bytes
from tltrain.data.pictures import libtiff
from tltrain.data.pictures.checks import damage, why_not_an_image

VERSION = 4
"""Version of the decoder. It is part of every cache key, so that a change of the decoder invalidates the caches."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")
"""Pillow formats that are accepted. Others are not safe: for PostScript, Pillow starts Ghostscript, whatever the file's suffix is."""
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".heic", ".heif", ".tif", ".tiff", ".bmp", ".gif",
    ".jp2", ".j2k", ".pgm", ".ppm",
)  # fmt: skip
MAX_ASPECT = 50
"""Largest ratio of the longer side to the shorter. Beyond it, resizing by the shorter side would need gigabytes."""
ORIENTATION = 0x0112
DEEP_WHITE = 65535
"""White of grey images with 16 bits, unless the recipe says otherwise (data.white)."""
_SUBFILE, _BITS, _PHOTOMETRIC, _PLANES = 254, 258, 262, 284  # tags of TIFF 6.0


def decode(content: bytes, white: int | None = None) -> Image.Image:
    """RGB image from a file's bytes: turned upright, in sRGB, transparency on white, 16 bits scaled to 8.

    white: as in `as_seen`.
    Raises Pillow's own errors for bytes it cannot read (OSError, ValueError, SyntaxError, ...), and ValueError for images that Pillow
    would decode wrongly.
    """
    with opened(content) as image:
        return as_seen(image, white)


@contextlib.contextmanager
def opened(content: bytes) -> Iterator[Image.Image]:
    """The image of a file as it is stored, loaded and found whole as far as its format can show. Raises as `decode`."""
    if (problem := why_not_an_image(content, reads_heif="HEIF" in formats())) is not None:
        raise ValueError(problem)
    with Image.open(io.BytesIO(content), formats=formats()) as image:
        if image.format == "PNG":
            with Image.open(io.BytesIO(content), formats=["PNG"]) as checked:
                checked.verify()  # load() stops at the last row and skips the checksums that reveal a flipped bit
        if (problem := damage(content, image.format)) is not None:
            raise ValueError(problem)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _choose_page(image)
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels; the sides may differ by a factor of {MAX_ASPECT} at most")
        _load(image)
        yield image


def as_seen(image: Image.Image, white: int | None = None) -> Image.Image:
    """RGB image from an opened image of any mode. Raises ValueError for a mode with an unknown white level.

    white: the stored value that is white in grey images with 16 bits; larger ones are white too. None: DEEP_WHITE. Packed 12 bits have
    their own white.
    """
    profile = image.info.get("icc_profile")
    return _to_rgb(_upright(image), image, profile, white or DEEP_WHITE)


def highest(image: Image.Image) -> int | None:
    """The largest stored value of an opened grey image whose white is `data.white`. None for all other images."""
    return int(image.getextrema()[1]) if _is_deep_grey(image) and not _is_packed(image) else None  # type: ignore[arg-type]


def bits_per_channel(image: Image.Image, content: bytes) -> int | None:
    """Bits of each channel as stored in a PNG or TIFF file. None for other formats."""
    if image.format == "PNG":
        return content[24]  # in the header chunk, which always comes first
    return max(image.tag_v2.get(_BITS, (1,))) if isinstance(image, TiffImagePlugin.TiffImageFile) else None


def decoded_bytes(content: bytes) -> int:
    """Memory that decoding takes at its peak, bytes: the stored pixels, and their copies on the way to RGB. 0 for what is no image."""
    try:
        with Image.open(io.BytesIO(content), formats=formats()) as image:
            large = image.has_transparency_data or _is_deep_grey(image) or image.format in ("WEBP", "AVIF", "HEIF", "JPEG2000")
            return (20 if large else 12) * image.width * image.height
    except Exception:  # decode() reports the error
        return 0


class Memory:
    """Limits the memory of concurrent decodes. A thread waits until its image fits. A single image is always admitted."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held, self.changed = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def room_for(self, content: bytes) -> Iterator[None]:
        num_bytes = decoded_bytes(content)
        with self.changed:
            self.changed.wait_for(lambda: self.held == 0 or self.held + num_bytes <= self.limit)
            self.held += num_bytes
        try:
            yield
        finally:
            with self.changed:
                self.held -= num_bytes
                self.changed.notify_all()


MEMORY = Memory(3 * 2**29)
"""For the threads of this process. Without it, six of them took 4 GiB for images of 6000 x 6000."""


def read_image(path: Path, white: int | None = None, tries: int = 3, wait_s: float = 0.2) -> Image.Image:
    """RGB image from a file that was readable when the data was scanned. Retries with growing waits, then raises UserError.

    white: as in `as_seen`.
    """
    return read_again(lambda: read_bytes(path), str(path), white, tries, wait_s)


def read_again(content: Callable[[], bytes], name: str, white: int | None = None, tries: int = 3, wait_s: float = 0.2) -> Image.Image:
    """As `read_image`, of bytes that are read by a function. name: of the image, in messages."""
    for attempt in range(tries):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the scan has reported Pillow's warnings
                return decode(content(), white)
        except UserError:
            raise
        except Exception as error:  # Pillow's errors for broken files have no common base class
            problem = describe(error)
        if attempt + 1 < tries:
            time.sleep(wait_s * 4**attempt)
    raise UserError(
        f"{name} could be read when the data was scanned, and now cannot: {problem} (tried {tries} times); "
        "no other image is used in its place: mend the file or the disk and start again"
    )


def describe(error: Exception) -> str:
    """An error as one line. Pillow's own text would name a memory buffer in place of the file."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a kind that is read here"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if str(error).startswith("decoder error"):
        return f"damaged, or stored in a way that is not read here ({error})"
    return f"{error}" or type(error).__name__


@lru_cache
def formats() -> list[str]:
    """The FORMATS that this Pillow can read. HEIF needs pillow-heif. Sets Pillow up at the first call."""
    Image.init()
    libtiff.listen()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs names no file and is raised too
    Image.core.set_block_size(2**26)  # type: ignore[attr-defined]  # glibc keeps freed blocks below 32 MiB for each thread, and gigabytes add up
    with contextlib.suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def _load(image: Image.Image) -> None:
    """Decode. libtiff's own words become the error, or a warning where Pillow reads on."""
    with libtiff.heard() as said:
        try:
            image.load()
        except OSError as error:
            if said:
                raise OSError(said[0]) from error
            raise
    if said:
        warnings.warn(f"libtiff: {said[0]}", stacklevel=2)


def _choose_page(image: TiffImagePlugin.TiffImageFile) -> None:
    """Seek to the first page that is not a thumbnail. Raises ValueError for a layout that Pillow decodes wrongly."""
    for page in range(getattr(image, "n_frames", 1)):
        image.seek(page)
        if not int(image.tag_v2.get(_SUBFILE, 0)) & 1:
            break
    else:
        image.seek(0)
    bits = image.tag_v2.get(_BITS, (1,))
    if image.tag_v2.get(_PLANES) == 2 and len(bits) > 1 and max(bits) > 8:
        raise ValueError(f"TIFF with {max(bits)} bits in separate planes, which Pillow scrambles; save it with interleaved channels")


def _upright(image: Image.Image) -> Image.Image:
    """Rotated by the orientation tag of EXIF, else of XMP."""
    exif = image.getexif()
    if ORIENTATION in exif:
        return ImageOps.exif_transpose(image)
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    match = re.search(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])", xmp if isinstance(xmp, bytes) else str(xmp).encode())
    if match is None:
        return image
    exif[ORIENTATION] = int(match[1])
    upright = ImageOps.exif_transpose(image)
    del exif[ORIENTATION]  # leave the caller's image unchanged
    return upright


def _to_rgb(image: Image.Image, opened: Image.Image, profile: bytes | None, white: int) -> Image.Image:
    """image: already upright. opened: the image as Pillow opened it, with its format and tags."""
    if _is_deep_grey(opened):
        image = _from_16_bit(image, opened, 4095 if _is_packed(opened) else white)
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} (32 bits) have no known white; save the image with 8 or 16 bits")
    if opened.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        image = image.convert("RGB")  # most programs write zeros as the fourth byte, so it is not transparency
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    if image.mode == "1":
        image = image.convert("L")
    image = image.convert("RGBA")
    rgba = _to_srgb(image.convert("RGB"), profile)
    rgba.putalpha(image.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB. profile: the image's ICC profile. None or an unusable one is treated as sRGB, as browsers do."""
    if profile:
        mode = image.mode if image.mode in ("RGB", "L", "CMYK") else "RGB"
        transform = _transform(profile, mode)
        if transform is not None:
            return ImageCms.applyTransform(image.convert(mode), transform) or image
    return image.convert("RGB")


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB. None if the profile is sRGB already, damaged, or of another mode."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(opened).lower():
            return None
        return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _is_deep_grey(opened: Image.Image) -> bool:
    return opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM"))


def _is_packed(opened: Image.Image) -> bool:
    """Whether this is a TIFF of 12 bits, which Pillow unpacks without scaling."""
    return isinstance(opened, TiffImagePlugin.TiffImageFile) and opened.tag_v2.get(_BITS) == (12,)


def _from_16_bit(image: Image.Image, opened: Image.Image, white: int) -> Image.Image:
    """Scale grey values from 0 to white to 8 bits. Pillow's own conversion clips everything above 255."""
    stored_HW = np.asarray(image).astype(np.uint32)
    pixels_HW = np.minimum(stored_HW, white)
    if isinstance(opened, TiffImagePlugin.TiffImageFile) and opened.tag_v2.get(_PHOTOMETRIC) == 0:
        pixels_HW = white - pixels_HW  # zero is white, which Pillow honours for 8 bits only
    grey = Image.fromarray(((pixels_HW * 255 + white // 2) // white).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    grey.putalpha(Image.fromarray(np.where(stored_HW == transparent, 0, 255).astype(np.uint8)))
    return grey
