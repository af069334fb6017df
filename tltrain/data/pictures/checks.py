"""Checks the bytes of an image file before decoding: not an image, or damage that Pillow does not notice."""

from __future__ import annotations

import re
import struct

import PIL

PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])
READS_SKIPS = (12, 2)
"""The first Pillow that reads a run-length coded bitmap which passes over pixels; earlier ones give a picture of one colour."""
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # a zero escapes 0xff among pixels; restarts stand there too
_RUN_LENGTHS = {(1, 8): 1, (2, 4): 2}
"""Pixels that one byte of an uncoded run holds, by a bitmap's (compression, bits)."""


def why_not_an_image(content: bytes, reads_heif: bool) -> str | None:
    """A message for common files that are not images, such as a Git LFS pointer or a web page. None for all other bytes."""
    start = content[:512].lstrip().lower()
    if not content:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the image: run `git lfs pull`"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML), not an image: the download went wrong"
    if content[128:132] == b"DICM":
        return "a DICOM file: convert it to PNG with the window that a reader would use"
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1") and not reads_heif:
        return "a HEIC file: `pip install 'tltrain[heif]'` and it is read, or convert it to JPEG"
    return None


def damage(content: bytes, kind: str | None) -> str | None:
    """A message for a file that Pillow would read although its bytes show that it is damaged. kind: Pillow's name of the format."""
    if kind in ("JPEG", "MPO") and not _has_end(content):
        return "a truncated JPEG: its end is missing, or overwritten (often by zeros)"
    return _damaged_bitmap(content) if kind == "BMP" else None


def _has_end(content: bytes) -> bool:
    """Whether a JPEG has an end-of-image marker behind its pixels. Where zeros stand in place of its rest, libjpeg reads grey from them."""
    at = 2
    while match := _JPEG_MARKER.search(content, at):
        if match[1] == b"\xd9":
            return True
        at = match.end() + int.from_bytes(content[match.end() : match.end() + 2])  # a segment, such as EXIF with a thumbnail in it
    return False


def _damaged_bitmap(content: bytes) -> str | None:
    """A message for a run-length coded BMP whose runs go beyond a row, or rows beyond the last one. Pillow cuts them off, other decoders
    refuse. Also for one that passes over pixels, where Pillow misreads that."""
    header, width, height, bits, compression = struct.unpack_from("<IiixxHI", content.ljust(34, b"\0"), 14)
    per_byte = _RUN_LENGTHS.get((compression, bits))
    if header < 40 or per_byte is None:
        return None
    row_end = (width + 7) // 8 * 8  # some programs code a row's padding too
    at, x, y = int.from_bytes(content[10:14], "little"), 0, 0
    while at + 1 < len(content):
        count, what, at = content[at], content[at + 1], at + 2
        if count:
            x += count
        elif what == 0:
            x, y = 0, y + 1
        elif what == 1:
            return None
        elif what == 2 and at + 1 < len(content):
            if PILLOW < READS_SKIPS:
                return f"a BMP that passes over pixels, which Pillow {PIL.__version__} misreads: upgrade Pillow, or convert it to PNG"
            x, y, at = x + content[at], y + content[at + 1], at + 2
        else:
            x, at = x + what, at + -(-what // (2 * per_byte)) * 2
        if x > row_end or y > abs(height) or (x and y == abs(height)):
            return "a damaged BMP: its run lengths lead out of the picture"
    return None  # it is cut off, which Pillow sees
