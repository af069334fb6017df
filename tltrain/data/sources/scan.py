"""Scans image files before training: decodes each once, and caches the results by path, size and modification time."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import PIL
from PIL import Image

from tltrain.core.errors import UserError, some
from tltrain.core.files import in_parallel, locked, read_bytes, write_atomic
from tltrain.core.paths import cache_root
from tltrain.data import decode as decoder
from tltrain.data.decode import DEEP_WHITE, MEMORY, as_seen, bits_per_channel, describe, highest, opened
from tltrain.data.pictures.warned import about, recorded

UNCHECKED = ("WEBP", "AVIF", "HEIF")
"""Compressed formats without a checksum, whose decoders take zeros for pixels. A large image of one colour may end in zeros too."""

FLAT = 4
"""Largest difference of a channel, of 255, within an image of one colour: JPEG leaves some."""
VERSION = 2
"""Of what is noted of a file. It is part of the cache's name, so that files are read again where more is noted."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scanned:
    """Scan result of one file: the hash of its bytes, and the problem if it cannot be used."""

    digest: str
    problem: str | None
    note: str | None = None
    """An oddity of a usable image, such as being all black."""
    highest: int | None = None
    """The largest stored value of a grey image whose white is data.white."""


def scan(paths: Sequence[Path], origin: str, white: int | None = None) -> list[Scanned]:
    """Read and decode each file, in parallel. Files whose path, size and time are in the cache are not read again.

    origin: the user's name of the source. white: data.white of the recipe. Both select the cache file. One process scans, and the others
    read its results.
    """
    name = hashlib.blake2b(f"{origin}|{PIL.__version__}|{decoder.VERSION}|{VERSION}|{white}".encode(), digest_size=8).hexdigest()
    cache = cache_root() / "scans" / f"{name}.json"
    cache.parent.mkdir(exist_ok=True)
    with locked(Path(f"{cache}.lock"), f"reads the images of {origin}"):
        known = _load(cache)
        keys = list(map(_key, paths))
        new = [(path, key) for path, key in zip(paths, keys, strict=True) if key not in known]
        unsaved: dict[str, Scanned] = {}
        if new:
            _log.info("%s: reading %d images once (%d known from before)", origin, len(new), len(paths) - len(new))
            try:
                unsaved = _read_all(new, known, white)
            finally:  # an interrupted scan keeps its results so far
                _save(cache, known, keys)
    results = known | unsaved
    return [results[key] for key in keys]


def check_readable(scanned: Sequence[Scanned], paths: Sequence[Path], limit: float, origin: str) -> tuple[str, ...]:
    """A note that lists the unreadable files, if any. Raises UserError for more than `limit`, a fraction of all files, rounded up."""
    bad = [f"{path} ({result.problem})" for path, result in zip(paths, scanned, strict=True) if result.problem]
    if not bad:
        return ()
    counted = f"{len(bad)} of {len(paths)} images cannot be read"
    allowed = math.ceil(limit * len(paths) - 1e-9)  # round up: 1 % of 19 files is one file
    if len(bad) > allowed:
        raise UserError(
            f"{origin}: {counted}, and max_unreadable = {limit:g} allows {allowed}: {some(bad)}; "
            "mend or remove the files, or raise data.max_unreadable"
        )
    return (f"{counted} and are left out: {some(bad)}",)


def odd_ones(scanned: Sequence[Scanned], paths: Sequence[Path]) -> tuple[str, ...]:
    """One note for each kind of oddity, with its files."""
    files: dict[str, list[str]] = {}
    for path, result in zip(paths, scanned, strict=True):
        if result.note and not result.problem:
            files.setdefault(result.note, []).append(str(path))
    return tuple(f"{len(names)} image{'s' * (len(names) > 1)} {what}: {some(names)}" for what, names in files.items())


def white_notes(scanned: Sequence[Scanned], paths: Sequence[Path], white: int | None) -> tuple[str, ...]:
    """What to know about grey images with 16 bits: values that stop far below white, or go beyond it. white: data.white of the recipe."""
    deep = {str(path): r.highest for path, r in zip(paths, scanned, strict=True) if r.highest is not None and not r.problem}
    if not deep:
        return () if white is None else (f"data.white is {white}, and no image is grey with 16 bits: it changes nothing",)
    top, limit, counted = max(deep.values()), white or DEEP_WHITE, f"{len(deep)} of {len(paths)} images are grey with 16 bits"
    if over := [path for path, value in deep.items() if value > limit]:
        return (f"{counted}, and {len(over)} of them hold values above data.white = {limit}, shown as white: {some(over)}",)
    if 0 < top <= limit // 2:
        bits = max(8, top.bit_length())
        return (
            f"{counted}, and no value in them is above {top}, where {limit} is white: they are seen dark. If they hold {bits} bits, as "
            f"those of many microscopes do, set data.white to {2**bits - 1}",
        )
    if dark := [path for path, value in deep.items() if 0 < value <= limit // 16]:
        return (
            f"{counted}, and {len(dark)} of them hold no value above {limit // 16}, where others go up to {top}: if they come from another "
            f"camera, scale them, since one data.white does not fit both: {some(dark)}",
        )
    return ()


def _key(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return f"{path}|absent"
    return f"{path}|{stat.st_size}|{stat.st_mtime_ns}"


def _read_all(new: Sequence[tuple[Path, str]], known: dict[str, Scanned], white: int | None) -> dict[str, Scanned]:
    """Scan files and add the results to `known`. Returns temporary failures, which must not be cached: the disk may recover."""
    temporary: dict[str, Scanned] = {}
    with recorded() as warned:
        results = in_parallel(lambda path: _read(path, white), [path for path, _ in new])  # Pillow releases the GIL while it decodes
        for (path, key), (result, permanent) in zip(new, results, strict=True):
            if result.note is None and (said := warned.get(str(path))):
                result = replace(result, note=f"of which Pillow warns ({said})")
            (known if permanent else temporary)[key] = result
    return temporary


def _read(path: Path, white: int | None) -> tuple[Scanned, bool]:
    """The scan result of a file, and whether it is permanent."""
    try:
        content = read_bytes(path)
    except OSError as error:
        return Scanned("", describe(error)), False
    return examined(str(path), content, white)


def examined(name: str, content: bytes, white: int | None) -> tuple[Scanned, bool]:
    """The scan result of an image's bytes, and whether it is permanent. name: what `recorded` tells Pillow's warnings by."""
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        with about(name), MEMORY.room_for(content), opened(content) as stored:
            return Scanned(digest, None, _oddity(stored, as_seen(stored, white), content), highest(stored)), True
    except MemoryError as error:  # temporary: not the fault of the file
        return Scanned(digest, describe(error)), False
    except Exception as error:  # Pillow's errors for broken files have no common base class
        return Scanned(digest, describe(error)), True


def _oddity(stored: Image.Image, seen: Image.Image, content: bytes) -> str | None:
    """What is odd about an image that can be used. stored, seen: before and after the conversion to RGB."""
    if seen.size == (1, 1):
        return "of a single pixel"
    lows, highs = zip(*seen.getextrema(), strict=True)
    if min(lows) == 255 or max(highs) == 0:
        return "all white" if min(lows) == 255 else "all black"
    if max(highs) < 16 and bits_per_channel(stored, content) == 16 and highest(stored) is None:
        return "of 16 bits in colour (or transparent) without a value above 4095, seen dark: save them with 8 bits (data.white is for grey)"
    if max(high - low for low, high in zip(lows, highs, strict=True)) <= FLAT:
        return "of one colour"
    if stored.format in UNCHECKED and content.endswith(bytes(max(64, len(content) // 10))):
        return "whose last tenth or more is zeros, as a broken download leaves them (this format has no checksum; look at them)"
    return None


def _load(cache: Path) -> dict[str, Scanned]:
    if not cache.is_file():
        return {}
    try:
        return {key: Scanned(*values) for key, values in json.loads(cache.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError):
        _log.warning("%s is damaged; the images are read again", cache)
        return {}


def _save(cache: Path, known: dict[str, Scanned], keys: Iterable[str]) -> None:
    """Save the results of the current files only, so that the cache does not grow forever."""
    current = {key: astuple(known[key]) for key in keys if key in known}
    write_atomic(cache, json.dumps(current))
