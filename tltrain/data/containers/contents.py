"""The contents of a container: the byte range and the label of each image. Each file is looked through once, and the result cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tltrain.core.errors import UserError
from tltrain.core.files import KINDS, locked, open_regular, write_atomic
from tltrain.core.paths import cache_root
from tltrain.data.remote.copies import local

VERSION = 2
"""Version of the cached result. It is part of the cache file's name, so a new version looks through all containers again."""

_log = logging.getLogger(__name__)


class Extent(NamedTuple):
    """The byte range of one image within a file, with its label, split and group."""

    name: str
    """In its container, such as cat/1.jpg."""
    start: int
    """First byte in the file."""
    length: int
    """Bytes in the file."""
    label: str = ""
    split: str = ""
    group: str = ""
    checksum: int = -1
    """CRC-32 of the image's bytes. -1: none is known."""
    deflated: bool = False
    """Whether the bytes are compressed by zlib, as in most zip files."""
    path: str = ""
    """The image file itself, if the container names a file in place of holding its bytes."""


@dataclass(frozen=True)
class Contents:
    """The images of one container."""

    file: Path
    """The file that holds their bytes: the container, or a copy of its images in the cache."""
    images: tuple[Extent, ...]
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    """The classes that the container names, in its order. Empty: it names none."""
    rows: int = 0
    """Number of rows of a table, including rows that are left out."""
    stamp: tuple[int, int] = (-1, -1)
    """Size and modification time of `file`, taken before it was looked through."""


def cached_contents(file: Path, what: str, look: Callable[[Path], Contents]) -> Contents:
    """The result of `look` for a container, cached by the file's path, size and modification time.

    One process looks, and the others read its result. what: the kind of the container, and whatever else the result depends on.
    Raises UserError as `look`.
    """
    name = hashlib.blake2b(f"{file}|{what}|{VERSION}".encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    cache = cache_root() / "contents" / f"{name}.json"
    cache.parent.mkdir(exist_ok=True)
    with locked(Path(f"{cache}.lock"), f"looks through {file}"):
        stamp = stamp_of(file)
        known = _load(cache, stamp)
        if known is None:
            known = look(file)
            value: dict[str, Any] = {"stamp": stamp, "file": str(known.file), "images": known.images, "rows": known.rows}
            value |= {"notes": known.notes, "classes": known.classes}
            write_atomic(cache, json.dumps(value))
        size, time_ns = stamp if known.file == file else stamp_of(known.file)
        return replace(known, stamp=(size, time_ns))


def stamp_of(file: Path) -> list[int]:
    """Size and modification time (ns) of a file. A file with another stamp is read anew."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def container(argument: str | None, source: str, what: str) -> Path:
    """The file that a source names, or a copy of it. Raises UserError if it is none. what: what it should be, such as a zip archive."""
    file = local(argument)
    if not argument or not os.path.exists(file):  # of a name that is too long it says no
        raise UserError(f"data.source is {source}:{argument or ''}; {file} is not there; give {what}")
    try:
        open_regular(file).close()
    except OSError as error:
        if file.is_dir():
            raise UserError(f"data.source is {source}:{argument}, which is {KINDS[0o040000]}; did you mean folder:{argument}?") from error
        raise UserError(f"data.source is {source}:{argument}, which cannot be read: {error.strerror or error}") from error
    return file


def _load(cache: Path, stamp: list[int]) -> Contents | None:
    try:
        value = json.loads(cache.read_text(encoding="utf-8"))
        images = tuple(Extent(*row) for row in value["images"])
        end = max((image.start + image.length for image in images), default=0)
        if value["stamp"] != stamp or not Path(value["file"]).is_file() or Path(value["file"]).stat().st_size < end:
            return None
        return Contents(Path(value["file"]), images, tuple(value["notes"]), tuple(value["classes"]), value["rows"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        _log.warning("%s is damaged; the container is looked through again", cache)
        return None
