"""Scans image files before training: decodes each once, and caches the results by path, size and modification time."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from PIL import Image

from tltrain.core.errors import LISTED, UserError, some
from tltrain.core.files import in_parallel, locked, read_bytes
from tltrain.core.output.console import duration
from tltrain.core.output.progress import Pace
from tltrain.core.paths import cache_root
from tltrain.data import decode as decoder
from tltrain.data.decode import DEEP_WHITE, MEMORY, as_seen, bits_per_channel, describe, highest, opened
from tltrain.data.pictures.warned import about, recorded
from tltrain.data.scans import record as records
from tltrain.data.scans.found import Found, Scanned
from tltrain.data.scans.record import Record
from tltrain.data.scans.sketch import HEAD_BYTES, TAIL_BYTES, chosen, glance
from tltrain.data.scans.stats import sizes_and_times
from tltrain.data.tables.texts import Texts

UNCHECKED = ("WEBP", "AVIF", "HEIF")
"""Compressed formats without a checksum, whose decoders take zeros for pixels. A large image of one colour may end in zeros too."""

FLAT = 4
"""Largest difference of a channel, of 255, within an image of one colour: JPEG leaves some."""
VERSION = 2
"""Of what is noted of a file. It is part of the cache's name, so that files are read again where more is noted."""

_log = logging.getLogger(__name__)


Result = tuple[Scanned, bool]
"""(scan result of a file, whether it is permanent). A failure of the disk is not: the disk may recover."""
Reading = Callable[[Path, int | None], Result]
Check = Literal["full", "sample", "headers"]

LEAST_TIMED = 32
"""Fewer images than this do not tell how fast they are read."""
PART = 2048
"""Images that are waited for at a time."""
KEPT = 256
"""A scan keeps what it has read each time it has read so many."""


def scan(paths: Sequence[str], origin: str, white: int | None = None, check: Check = "full") -> Found:
    """Read and decode each file, in parallel. Files whose path, size and time are in the cache are not read again.

    origin: the user's name of the source. white: data.white of the recipe. check: data.check. All three select the cache file. Sizes and
    times are looked up without a lock. One process reads what is new, and the others take its results. What was read is kept as it goes.
    """
    key = f"{origin}|{PIL.__version__}|{decoder.VERSION}|{VERSION}|{white}{'' if check == 'full' else f'|{check}'}"
    cache = cache_root() / "scans" / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.scan"
    cache.parent.mkdir(exist_ok=True)
    paths = Texts.of(paths)
    size_N, time_N = sizes_and_times(paths)
    known, row_N = _known(cache, paths, size_N, time_N)
    if (row_N < 0).any() or known is None or not known.one_block:
        with locked(cache.with_suffix(".lock"), f"reads the images of {origin}"):
            known, row_N = _known(cache, paths, size_N, time_N)  # another process may have read them meanwhile
            new = np.flatnonzero(row_N < 0)
            if len(new):
                _log.info("%s: reading %d images once (%d known from before)", origin, len(new), len(paths) - len(new))
            return _complete(cache, Record(paths, size_N, time_N, Found.of([])), known, row_N, white, check)
    return known.found.take(row_N)


def _known(cache: Path, paths: Texts, size_N: np.ndarray, time_N: np.ndarray) -> tuple[Record | None, np.ndarray]:
    """The record, and the row of each file in it, (N,) int64. -1: not known."""
    record = records.load(cache)
    return record, np.full(len(paths), -1) if record is None else record.rows(paths, size_N, time_N)


def _complete(cache: Path, now: Record, known: Record | None, row_N: np.ndarray, white: int | None, check: Check) -> Found:
    """Read what is not known, and write the record of the present files. Returns what was found of all of them."""
    new, parts, lasting_N = np.flatnonzero(row_N < 0), [] if known is None else [known.found], row_N >= 0
    num_rows, per_s = sum(map(len, parts)), 0.0 if known is None else known.found.full_per_s

    def keep(at: np.ndarray, results: list[Result]) -> None:
        nonlocal num_rows
        parts.append(Found.of(result for result, _ in results))
        row_N[at], num_rows = num_rows + np.arange(len(at)), num_rows + len(at)
        lasting_N[at] = [is_permanent for _, is_permanent in results]
        if (chosen_M := lasting_N[at]).any():
            records.append(cache, now.part(at[chosen_M], parts[-1].take(np.flatnonzero(chosen_M))))

    decoded_M = np.ones(len(new), bool) if check == "full" else chosen(now.paths.with_prefix(""), len(now.paths), check)[new]
    records.make_ready(cache, known)
    pace = Pace("images read", int(decoded_M.sum()))
    _read_all(_read if check == "full" else _sketched, now.paths, new[decoded_M], white, pace, keep)
    per_s = pace.per_s if pace.total >= LEAST_TIMED else per_s
    if not decoded_M.all():
        _read_all(_glanced, now.paths, new[~decoded_M], white, Pace("images looked at", int((~decoded_M).sum())), keep)
    found = replace(Found.joined(parts).take(row_N), full_per_s=per_s)
    at = np.flatnonzero(lasting_N)
    records.replace(cache, now.part(at, found.take(at)))
    return found


def check_readable(found: Found, paths: Sequence[str], limit: float, origin: str) -> tuple[str, ...]:
    """A note that lists the unreadable files, if any. Raises UserError for more than `limit`, a fraction of all files, rounded up.

    Where only some were decoded, it holds for those too.
    """
    bad_N = found.problem_N > 0
    num_bad = int(bad_N.sum())
    if num_bad == 0:
        return ()
    bad = [f"{paths[i]} ({found.words[found.problem_N[i]]})" for i in np.flatnonzero(bad_N)[:LISTED].tolist()]
    for what, counted_N in (("images", np.ones(len(bad_N), bool)), ("decoded images", found.decoded_N)):
        num, total = int(bad_N[counted_N].sum()), int(counted_N.sum())
        counted = f"{num} of {total} {what} cannot be read"
        allowed = math.ceil(limit * total - 1e-9)  # round up: 1 % of 19 files is one file
        if num > allowed:
            raise UserError(
                f"{origin}: {counted}, and max_unreadable = {limit:g} allows {allowed}: {some(bad, num_bad)}; "
                "mend or remove the files, or raise data.max_unreadable"
            )
    return (f"{num_bad} of {len(bad_N)} images cannot be read and are left out: {some(bad, num_bad)}",)


def check_notes(found: Found, check: Check) -> tuple[str, ...]:
    """A note on damage that data.check cannot see, and on the time of a full check."""
    if check == "full":
        return ()
    num, total = int(found.decoded_N.sum()), len(found)
    takes = f"; a full check would take about {duration(total / found.full_per_s)} here" if found.full_per_s else ""
    return (
        f"data.check is {check}: {num:,} of {total:,} images were decoded, and of the others the first {HEAD_BYTES // 1024} and last "
        f"{TAIL_BYTES // 1024} KiB were read. Not seen in those: damage in between, images of one colour, 16 bits that are dark, bytes in "
        f"between that change while the size stays{takes}",
    )


def odd_ones(found: Found, paths: Sequence[str]) -> tuple[str, ...]:
    """One note for each kind of oddity, with its files."""
    note_N = np.where(found.problem_N > 0, 0, found.note_N)
    kinds, first = np.unique(note_N, return_index=True)
    notes = []
    for kind in kinds[np.argsort(first)].tolist():
        at = np.flatnonzero(note_N == kind)
        if kind:
            names = [paths[i] for i in at[:LISTED].tolist()]
            notes.append(f"{len(at)} image{'s' * (len(at) > 1)} {found.words[kind]}: {some(names, len(at))}")
    return tuple(notes)


def white_notes(found: Found, paths: Sequence[str], white: int | None) -> tuple[str, ...]:
    """Notes on grey images with 16 bits whose values stop far below white, or go beyond it. white: data.white of the recipe."""
    at = np.flatnonzero((found.highest_N >= 0) & (found.problem_N == 0))
    if not len(at):
        unused = white is not None and found.decoded_N.all()
        return (f"data.white is {white}, and no image is grey with 16 bits: it changes nothing",) if unused else ()
    value_M = found.highest_N[at]
    top, limit, counted = int(value_M.max()), white or DEEP_WHITE, f"{len(at)} of {len(found)} images are grey with 16 bits"

    def listed(which_M: np.ndarray) -> str:
        return some([paths[i] for i in at[which_M][:LISTED].tolist()], int(which_M.sum()))

    if (over_M := value_M > limit).any():
        return (f"{counted}, and {over_M.sum()} of them hold values above data.white = {limit}, shown as white: {listed(over_M)}",)
    if 0 < top <= limit // 2:
        bits = max(8, top.bit_length())
        return (
            f"{counted}, and no value in them is above {top}, where {limit} is white: they are seen dark. If they hold {bits} bits, as "
            f"those of many microscopes do, set data.white to {2**bits - 1}",
        )
    if (dark_M := (value_M > 0) & (value_M <= limit // 16)).any():
        return (
            f"{counted}, and {dark_M.sum()} of them hold no value above {limit // 16}, where others go up to {top}: if they come from "
            f"another camera, scale them, since one data.white does not fit both: {listed(dark_M)}",
        )
    return ()


def _read_all(
    read: Reading, paths: Texts, places: np.ndarray, white: int | None, pace: Pace, keep: Callable[[np.ndarray, list[Result]], None]
) -> None:
    """Read the files at these places (M,), and hand on KEPT results at a time with their places; the last also where a stop ends it."""
    rows: list[Result] = []
    num_kept = 0
    try:
        for begin in range(0, len(places), PART):
            part = list(paths.take(places[begin : begin + PART]))
            with recorded() as warned:
                results = in_parallel(lambda path: read(path, white), list(map(Path, part)))  # Pillow releases the GIL while it decodes
                for path, (result, is_permanent) in zip(part, results, strict=True):
                    if result.note is None and (said := warned.get(path)):
                        result = replace(result, note=f"of which Pillow warns ({said})")
                    rows.append((result, is_permanent))
                    pace.advance()
                    if len(rows) == KEPT:
                        full, rows = rows, []
                        keep(places[num_kept : num_kept + KEPT], full)
                        num_kept += KEPT
    finally:
        if rows:
            keep(places[num_kept : num_kept + len(rows)], rows)


def _sketched(path: Path, white: int | None) -> Result:
    """As `_read`, with the hash that `_glanced` takes."""
    result, is_permanent = _read(path, white)
    return replace(result, digest=glance(path)[1]), is_permanent


def _glanced(path: Path, white: int | None) -> Result:
    """The result of a look at a file's beginning and end. A file whose end is not there is read whole."""
    result, _, is_permanent = glance(path)
    return _sketched(path, white) if result is None else (result, is_permanent)


def _read(path: Path, white: int | None) -> Result:
    """The scan result of a file, and whether it is permanent."""
    try:
        content = read_bytes(path)
    except OSError as error:
        return Scanned("", describe(error)), False
    return examined(str(path), content, white)


def examined(name: str, content: bytes, white: int | None) -> Result:
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
    """An oddity of a usable image, such as a single colour, or None. stored, seen: before and after the conversion to RGB."""
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
