"""Reads every image file once before the first step, and remembers the answer by path, size and time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import PIL
from filelock import FileLock

from tltrain.data.decode import decode, describe
from tltrain.data.places import cache_root
from tltrain.errors import UserError
from tltrain.files import write_atomic

LISTED = 20
"""Files or classes that one note names; it counts the rest."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scanned:
    """What reading a file said: the hash of its bytes, or why it cannot be used."""

    digest: str
    problem: str | None


def scan(paths: Sequence[Path], origin: str) -> list[Scanned]:
    """Each file read and decoded, in parallel; files known by path, size and time are not read again.

    origin: what the user calls the source; it picks the cache file. Of several processes one scans and the others read its answer.
    """
    name = hashlib.blake2b(f"{origin}|{PIL.__version__}".encode(), digest_size=8).hexdigest()
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
    """A note that lists the unreadable files, or none. Raises UserError if they are more than `limit`, a fraction of all."""
    bad = [f"{path} ({found.problem})" for path, found in zip(paths, scanned, strict=True) if found.problem]
    if not bad:
        return ()
    counted = f"{len(bad)} of {len(paths)} images cannot be read"
    if len(bad) > limit * len(paths):
        raise UserError(
            f"{origin}: {counted}, more than max_unreadable = {limit:g} of them: {some(bad)}; "
            "mend or remove the files, or raise data.max_unreadable"
        )
    return (f"{counted} and are left out: {some(bad)}",)


def some(names: Sequence[str]) -> str:
    """The names, cut after a while."""
    rest = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest


def _key(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return f"{path}|absent"
    return f"{path}|{stat.st_size}|{stat.st_mtime_ns}"


def _read_all(new: Sequence[tuple[Path, str]], known: dict[str, Scanned]) -> dict[str, Scanned]:
    """Adds to `known`; returns what must not be remembered: a disk's error may be gone the next time."""
    passing: dict[str, Scanned] = {}
    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        for start in range(0, len(new), 1024):  # not all at once: an interrupt waits for what is under way
            part = new[start : start + 1024]
            for (_, key), (found, lasting) in zip(part, pool.map(_read, [path for path, _ in part]), strict=True):
                (known if lasting else passing)[key] = found
    return passing


def _read(path: Path) -> tuple[Scanned, bool]:
    """What the file says, and whether it will say the same again."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return Scanned("", describe(error)), False
    try:
        decode(content)
        problem = None
    except Exception as error:  # Pillow has no common base for what a broken file makes it raise
        problem = describe(error)
    return Scanned(hashlib.blake2b(content, digest_size=16).hexdigest(), problem), True


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
    current = {key: (known[key].digest, known[key].problem) for key in keys if key in known}
    write_atomic(cache, json.dumps(current))
