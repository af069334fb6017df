"""A look at the beginning and the end of an image file: what data.check does where it does not decode every image."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

import numpy as np
from PIL import Image

from tltrain.core.files import open_regular
from tltrain.data.decode import MAX_ASPECT, describe, formats
from tltrain.data.pictures.checks import why_not_an_image
from tltrain.data.pictures.warned import about
from tltrain.data.scans.found import DIGEST_BYTES, Scanned

HEAD_BYTES, TAIL_BYTES = 16384, 4096
"""Bytes that are read at the beginning and the end. A file of at most their sum is read whole."""
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
"""End markers of complete files, by Pillow's name of the format."""
DECODED = {"sample": (0.02, 1000), "headers": (0.0, 64)}
"""Images that are decoded nevertheless, by data.check: (share, minimum number)."""


def chosen(ids: Iterable[str], num: int, check: str) -> np.ndarray:
    """(N,) bool: the images that are decoded under `sample` and `headers`. By a hash of their names, so that others change nothing."""
    share, least = DECODED[check]
    limit = 2**32 * max(share, least / max(num, 1))
    return np.fromiter((zlib.crc32(name.encode("utf-8", "surrogateescape")) < limit for name in ids), bool, num)


def glance(path: Path) -> tuple[Scanned | None, str, bool]:
    """(result, hash of size, beginning and end, whether both last). No result: it may be cut off, so read all of it."""
    try:
        with open_regular(path) as file, about(str(path)):
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEAD_BYTES)
            file.seek(max(len(head), size - TAIL_BYTES))
            tail = file.read(TAIL_BYTES)
            digest = hashlib.blake2b(b"%d|" % size + head + tail, digest_size=DIGEST_BYTES).hexdigest()
            try:
                if not _has_end(file, head, tail):
                    return None, digest, True
            except MemoryError as error:
                return Scanned(digest, describe(error), decoded=False), digest, False
            except Exception as error:  # Pillow's errors for broken files have no common base class
                return Scanned(digest, describe(error), decoded=False), digest, True
    except OSError as error:
        return Scanned("", describe(error), decoded=False), "", False
    return Scanned(digest, None, decoded=False), digest, True


def _has_end(file: BufferedReader, head: bytes, tail: bytes) -> bool:
    """Whether a file has the end of its format, if that has one. Raises what its header shows to be wrong."""
    if (problem := why_not_an_image(head, reads_heif="HEIF" in formats())) is not None:
        raise ValueError(problem)
    file.seek(0)
    with Image.open(file, formats=formats()) as image:
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels; the sides may differ by a factor of {MAX_ASPECT} at most")
        end = ENDS.get(image.format or "", b"")
    return end in (head + tail)[-TAIL_BYTES:]
