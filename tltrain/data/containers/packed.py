"""Builds a source from images that are bytes within other files: scans them, and reads each by its number."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from tltrain.core.errors import UserError
from tltrain.core.files import in_parallel, locked, open_regular, write_atomic
from tltrain.core.output.progress import Pace
from tltrain.core.paths import cache_root
from tltrain.core.recipe import Data
from tltrain.data import decode as decoder
from tltrain.data.containers.contents import Contents, Extent, stamp_of
from tltrain.data.dataset import Source
from tltrain.data.decode import describe, read_again
from tltrain.data.pictures.warned import recorded
from tltrain.data.scans.found import Scanned
from tltrain.data.sources import scan as scanning
from tltrain.data.sources.image_list import from_files
from tltrain.data.sources.scan import examined
from tltrain.data.tables.listing import Listed

KEPT = 50_000
"""Results of one file that are kept at a time: a process that is killed loses fewer."""
MOST_BYTES = 2**30
"""The largest file of an image that is unpacked. A few kilobytes that say they are gigabytes would fill the memory."""

_log = logging.getLogger(__name__)


class Packed(NamedTuple):
    """One image: its name, split, label and group, and the bytes that it is."""

    listed: Listed
    file: Path
    extent: Extent
    stamp: tuple[int, int]
    """Size and time of the file when it was looked through."""


@dataclass(frozen=True)
class PackedReader:
    """Reads the image with a number from the bytes of its file. Pickled as four arrays and the names of the files."""

    files: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]
    """Size and time (ns) of each file when it was looked through."""
    file_N: np.ndarray
    start_N: np.ndarray
    length_N: np.ndarray
    deflated_N: np.ndarray
    white: int | None = None
    """data.white of the recipe."""

    def __call__(self, number: int) -> Image.Image:
        name = f"the image at byte {self.start_N[number]} of {self.files[self.file_N[number]]}"
        return read_again(lambda: self.content(number), name, self.white)

    def content(self, number: int) -> bytes:
        """The image's bytes. Raises OSError, zlib.error for what cannot be unpacked, and UserError where the file is another one now."""
        length, which = int(self.length_N[number]), int(self.file_N[number])
        with open_regular(Path(self.files[which])) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != self.stamps[which]:  # other images would lie at these places
                raise UserError(
                    f"{self.files[which]} has changed since it was looked through, so that its images lie elsewhere; "
                    "start again once nobody writes it"
                )
            stored = os.pread(file.fileno(), length, int(self.start_N[number]))  # Linux gives up to 2 GiB at once
        if len(stored) != length:
            raise OSError(f"the file ends {length - len(stored)} bytes before the image does")
        return _inflated(stored) if self.deflated_N[number] else stored


def from_packed(
    images: Sequence[Packed], origin: str, spec: Data, notes: tuple[str, ...] = (), order: Sequence[str] = (), labelled: bool = True
) -> Source:
    """The source of these images. Raises UserError for too many unreadable ones, and for fewer than two classes.

    origin: the user's name of the source. order: of the classes, where it is not that of the alphabet. Tables may name files in place of
    bytes; those are read where they lie, and refused beside bytes. labelled: whether there must be classes.
    """
    if apart := sum(bool(image.extent.path) for image in images):
        if apart < len(images):
            raise UserError(f"{origin}: {apart:,} of its {len(images):,} images lie in files of their own and the others do not; write the "
                            "bytes of all of them into the tables")  # fmt: skip
        return from_files([image.listed for image in images], origin, spec, notes, order=order, labelled=labelled)

    def look(kept: Sequence[int]) -> tuple[list[Scanned], PackedReader]:
        used = [images[i] for i in kept]
        read = _reader(used, spec.white)
        return _scan(used, read, origin), read

    return from_files([image.listed for image in images], origin, spec, notes, look, order, labelled)


def of_contents(contents: Contents, prefix: str, place: Path, split: str) -> list[Packed]:
    """The images of a container under the names prefix/NAME. place: what messages call it. split: where an image names none itself."""
    return [
        Packed(
            Listed(Path(e.path) if e.path else place / e.name, f"{prefix}/{e.name}", e.split or split, e.label, e.group),
            contents.file,
            e,
            contents.stamp,
        )
        for e in contents.images
    ]


def numbers_first(labels: Sequence[str]) -> tuple[str, ...]:
    """The classes in their order: by value where all are whole numbers, else empty, which is the order of the alphabet."""
    names = set(labels)
    if not all(name.isdecimal() and name.isascii() for name in names):
        return ()
    plain = {name: name.lstrip("0") for name in names}  # Python makes no number of thousands of digits
    return tuple(sorted(names, key=lambda name: (len(plain[name]), plain[name], name)))


def _inflated(stored: bytes) -> bytes:
    """The bytes that zlib packed. Raises zlib.error where they are damaged or cut, and for more than MOST_BYTES."""
    machine = zlib.decompressobj(wbits=-15)
    content = machine.decompress(stored, MOST_BYTES)
    if machine.unconsumed_tail or not machine.eof:
        raise zlib.error(f"more than {MOST_BYTES:,} bytes" if machine.unconsumed_tail else "it is cut")
    return content


def _reader(used: Sequence[Packed], white: int | None) -> PackedReader:
    stamps = {str(image.file): image.stamp for image in used}
    number = {name: i for i, name in enumerate(stamps)}
    columns = [(number[str(file)], e.start, e.length, e.deflated) for _, file, e, _ in used]
    file_N, start_N, length_N, deflated_N = np.array(columns, dtype=np.int64).reshape(-1, 4).T
    return PackedReader(tuple(stamps), tuple(stamps.values()), file_N, start_N, length_N, deflated_N.astype(bool), white)


def _scan(used: Sequence[Packed], read: PackedReader, origin: str) -> list[Scanned]:
    """Read and decode each image, in parallel. What is known of a file of the same size and time is not read again."""
    results: list[Scanned | None] = [None] * len(used)
    by_file: dict[Path, list[int]] = {}
    for i, image in enumerate(used):
        by_file.setdefault(image.file, []).append(i)
    pace = Pace("images read", len(used))
    for file, numbers in by_file.items():
        name = f"{file}|{PIL.__version__}|{decoder.VERSION}|{scanning.VERSION}|{read.white}"
        cache = cache_root() / "scans" / f"{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}.json"
        cache.parent.mkdir(exist_ok=True)
        with locked(Path(f"{cache}.lock"), f"reads the images of {file}"):
            known = _load(cache, stamp := stamp_of(file))
            new = [i for i in numbers if _key(used[i].extent) not in known]
            temporary: dict[str, Scanned] = {}
            pace.advance(len(numbers) - len(new))
            if new:
                _log.info("%s: reading %d images of %s once (%d known from before)", origin, len(new), file, len(numbers) - len(new))
            for part in (new[i : i + KEPT] for i in range(0, len(new), KEPT)):
                try:
                    temporary |= _read_all(used, part, read, known, pace)
                finally:  # an interrupted scan keeps its results so far
                    write_atomic(cache, json.dumps({"stamp": stamp, "images": {key: astuple(value) for key, value in known.items()}}))
            for i in numbers:
                key = _key(used[i].extent)
                results[i] = known.get(key) or temporary[key]
    return [result for result in results if result is not None]


def _read_all(used: Sequence[Packed], new: Sequence[int], read: PackedReader, known: dict[str, Scanned], pace: Pace) -> dict[str, Scanned]:
    """Add the results to `known`. Returns temporary failures, which must not be kept: the disk may recover."""
    temporary: dict[str, Scanned] = {}
    with recorded() as warned:
        results = in_parallel(lambda i: _look(used[i], i, read), new)  # Pillow and zlib release the GIL
        for i, (result, permanent) in zip(new, results, strict=True):
            if result.note is None and (said := warned.get(str(used[i].listed.path))):
                result = Scanned(result.digest, result.problem, f"of which Pillow warns ({said})", result.highest)
            (known if permanent else temporary)[_key(used[i].extent)] = result
            pace.advance()
    return temporary


def _look(image: Packed, number: int, read: PackedReader) -> tuple[Scanned, bool]:
    """The scan result of an image, and whether it is permanent."""
    try:
        content = read.content(number)
    except zlib.error as error:
        return Scanned("", f"damaged in its archive ({error})"), True
    except OSError as error:
        return Scanned("", describe(error)), False
    if image.extent.checksum not in (-1, zlib.crc32(content)):
        return Scanned("", "damaged in its archive (another checksum than was noted there)"), True
    return examined(str(image.listed.path), content, read.white)


def _key(extent: Extent) -> str:
    return f"{extent.start}+{extent.length}"


def _load(cache: Path, stamp: list[int]) -> dict[str, Scanned]:
    try:
        value = json.loads(cache.read_text(encoding="utf-8"))
        return {key: Scanned(*row) for key, row in value["images"].items()} if value["stamp"] == stamp else {}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        _log.warning("%s is damaged; the images are read again", cache)
        return {}
