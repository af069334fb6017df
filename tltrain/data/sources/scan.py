"""Reads every image file once before the first step, and remembers the answer by path, size and time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from filelock import FileLock
from PIL import Image

from tltrain.core.errors import UserError, some
from tltrain.core.files import read_bytes, write_atomic
from tltrain.core.paths import cache_root
from tltrain.data import decode as decoder
from tltrain.data.decode import decode, describe

DECODED_BYTES = 2**30
"""Decoded images that are in memory at the same time, bytes: a dozen of 6000 x 6000 pixels in six threads took 4 GiB."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scanned:
    """What reading a file said: the hash of its bytes, or why it cannot be used."""

    digest: str
    problem: str | None
    note: str | None = None
    """What is odd about an image that can be used."""


def scan(paths: Sequence[Path], origin: str) -> list[Scanned]:
    """Each file read and decoded, in parallel; files known by path, size and time are not read again.

    origin: what the user calls the source; it picks the cache file. Of several processes one scans and the others read its answer.
    """
    name = hashlib.blake2b(f"{origin}|{PIL.__version__}|{decoder.VERSION}".encode(), digest_size=8).hexdigest()
    cache = cache_root() / "scans" / f"{name}.json"
    cache.parent.mkdir(exist_ok=True)
    with FileLock(f"{cache}.lock"):
        known = _load(cache)
        keys = list(map(_key, paths))
        new = [(path, key) for path, key in zip(paths, keys, strict=True) if key not in known]
        unsaved: dict[str, Scanned] = {}
        if new:
            _log.info("%s: reading %d images once (%d known from before)", origin, len(new), len(paths) - len(new))
            try:
                unsaved = _read_all(new, known)
            finally:  # what is known stays known when the scan is interrupted
                _save(cache, known, keys)
    answers = known | unsaved
    return [answers[key] for key in keys]


def check_readable(scanned: Sequence[Scanned], paths: Sequence[Path], limit: float, origin: str) -> tuple[str, ...]:
    """A note that lists the unreadable files, or none. Raises UserError if they are more than `limit`, a fraction of all, rounded up."""
    bad = [f"{path} ({found.problem})" for path, found in zip(paths, scanned, strict=True) if found.problem]
    if not bad:
        return ()
    counted = f"{len(bad)} of {len(paths)} images cannot be read"
    allowed = math.ceil(limit * len(paths) - 1e-9)  # whole files: 1 % of 19 is one
    if len(bad) > allowed:
        raise UserError(
            f"{origin}: {counted}, and max_unreadable = {limit:g} allows {allowed}: {some(bad)}; "
            "mend or remove the files, or raise data.max_unreadable"
        )
    return (f"{counted} and are left out: {some(bad)}",)


def odd_ones(scanned: Sequence[Scanned], paths: Sequence[Path]) -> tuple[str, ...]:
    """A note for each kind of oddity, with the files."""
    files: dict[str, list[str]] = {}
    for path, found in zip(paths, scanned, strict=True):
        if found.note and not found.problem:
            files.setdefault(found.note, []).append(str(path))
    return tuple(f"{len(names)} image{'s' * (len(names) > 1)} {what}: {some(names)}" for what, names in files.items())


def _key(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return f"{path}|absent"
    return f"{path}|{stat.st_size}|{stat.st_mtime_ns}"


def _read_all(new: Sequence[tuple[Path, str]], known: dict[str, Scanned]) -> dict[str, Scanned]:
    """Adds to `known`; returns what must not be remembered: a disk's error may be gone the next time."""
    passing: dict[str, Scanned] = {}
    with _warnings_by_thread(), ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        for start in range(0, len(new), 1024):  # not all at once: an interrupt waits for what is under way
            part = new[start : start + 1024]
            for (_, key), (found, lasting) in zip(part, pool.map(_read, [path for path, _ in part]), strict=True):
                (known if lasting else passing)[key] = found
    return passing


def _read(path: Path) -> tuple[Scanned, bool]:
    """What the file says, and whether it will say the same again."""
    try:
        content = read_bytes(path)
    except OSError as error:
        return Scanned("", describe(error)), False
    digest, _said.by_pillow = hashlib.blake2b(content, digest_size=16).hexdigest(), None
    try:
        with _MEMORY.room_for(_decoded_bytes(content)):
            return Scanned(digest, None, _oddity(decode(content)) or _said.by_pillow), True
    except MemoryError as error:  # of this moment, not of the file
        return Scanned(digest, describe(error)), False
    except Exception as error:  # Pillow has no common base for what a broken file makes it raise
        return Scanned(digest, describe(error)), True


def _oddity(image: Image.Image) -> str | None:
    if image.size == (1, 1):
        return "of a single pixel"
    lows, highs = zip(*image.getextrema(), strict=True)
    return "all white" if min(lows) == 255 else "all black" if max(highs) == 0 else None


def _decoded_bytes(content: bytes) -> int:
    """About what decoding takes: the pixels as they are, and as RGB."""
    try:
        with Image.open(io.BytesIO(content), formats=decoder.formats()) as image:
            return 7 * image.width * image.height
    except Exception:  # decode says it better
        return 0


class _Memory:
    """Lets threads wait until what they are about to decode fits beside what the others hold; one alone always may."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held, self.changed = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def room_for(self, num_bytes: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.held == 0 or self.held + num_bytes <= self.limit)
            self.held += num_bytes
        try:
            yield
        finally:
            with self.changed:
                self.held -= num_bytes
                self.changed.notify_all()


_MEMORY = _Memory(DECODED_BYTES)
_said = threading.local()


@contextlib.contextmanager
def _warnings_by_thread() -> Iterator[None]:
    """Inside, what Pillow warns of is kept for the thread that decodes, and printed by nobody: without a file's name it helps nobody."""

    def keep(message: Warning | str, *rest: Any, **named: Any) -> None:
        _said.by_pillow = f"of which Pillow warns ({str(message).strip().splitlines()[0]})"

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = keep
        yield


def _load(cache: Path) -> dict[str, Scanned]:
    if not cache.exists():
        return {}
    try:
        return {key: Scanned(*found) for key, found in json.loads(cache.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError):
        _log.warning("%s is damaged; the images are read again", cache)
        return {}


def _save(cache: Path, known: dict[str, Scanned], keys: Iterable[str]) -> None:
    """Only files that are there now, so that the cache does not grow for ever."""
    current = {key: (known[key].digest, known[key].problem, known[key].note) for key in keys if key in known}
    write_atomic(cache, json.dumps(current))
