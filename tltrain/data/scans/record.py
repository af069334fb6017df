"""The file that keeps what a scan found: blocks of columns, each with its checksum, so that a killed scan keeps what it had read.

A block is MARK, the length of its content as 8 bytes, the content, and the BLAKE2b hash of the content. The content is the length of a
JSON head as 8 bytes, the head, and the columns. A later block counts where two name the same file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tltrain.core.files import read_bytes, write_atomic
from tltrain.data.scans.found import DIGEST_BYTES, Found, Scanned
from tltrain.data.tables.texts import Texts

MARK = b"tltrain scan 1\n\0"
_HASH_BYTES = 32
_NUMBERS = (("size", "<i8"), ("time", "<i8"), ("problem", "<i4"), ("note", "<i4"), ("highest", "<i4"), ("decoded", "|b1"))

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Record:
    """N files as they were when they were read."""

    paths: Texts
    size_N: np.ndarray
    """(N,) int64, bytes."""
    time_N: np.ndarray
    """(N,) int64, time of the last change in nanoseconds."""
    found: Found
    one_block: bool = True
    """Whether the file holds one block. Others are left by a scan that was interrupted."""
    end: int = 0
    """The first byte behind the whole blocks of the file."""

    def part(self, at: np.ndarray, found: Found) -> Record:
        """The files at these places (M,), of which this was found."""
        return Record(self.paths.take(at), self.size_N[at], self.time_N[at], found)

    def rows(self, paths: Texts, size_M: np.ndarray, time_M: np.ndarray) -> np.ndarray:
        """(M,) int64: the row of each of these files. -1 for those that are not known, or have another size or time now."""
        if self.paths == paths:
            row_M = np.arange(len(paths))
        else:
            row_of = dict(zip(self.paths, range(len(self.paths)), strict=True))
            row_M = np.fromiter((row_of.get(path, -1) for path in paths), np.int64, len(paths))
        known = np.flatnonzero(row_M >= 0)
        same = (self.size_N[row_M[known]] == size_M[known]) & (self.time_N[row_M[known]] == time_M[known]) & (size_M[known] >= 0)
        row_M[known[~same]] = -1
        return row_M


def load(file: Path) -> Record | None:
    """What the file holds. None without one. A block that is damaged, and those behind it, are left out with a word."""
    if not file.is_file():
        old = file.with_suffix(".json")
        return _old(old) if old.is_file() else None
    blocks = list(_blocks(file, memoryview(read_bytes(file))))
    if len(blocks) <= 1:
        return next(iter(blocks), None)
    paths = Texts.of(path for block in blocks for path in block.paths)
    size_N, time_N = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("size_N", "time_N"))
    return Record(paths, size_N, time_N, Found.joined([block.found for block in blocks]), one_block=False, end=blocks[-1].end)


def replace(file: Path, record: Record) -> None:
    """Write the file anew, with this record alone. A file of an earlier version beside it goes."""
    write_atomic(file, _packed(record))
    file.with_suffix(".json").unlink(missing_ok=True)


def make_ready(file: Path, known: Record | None) -> None:
    """Before the first `append`, under the lock: what is behind the whole blocks goes, since `load` reads nothing behind it.

    known: what `load` gave. If it is of an earlier version, it becomes the first block, since that file counts alone.
    """
    if file.is_file():
        os.truncate(file, 0 if known is None else known.end)
    elif known is not None:
        replace(file, known)


def append(file: Path, record: Record) -> None:
    """Add a block. What is cut off by a kill or a full disk is left out by `load`."""
    with file.open("ab") as out:
        out.write(_packed(record))


def _packed(record: Record) -> bytes:
    found, num = record.found, len(record.paths)
    columns = record.size_N, record.time_N, found.problem_N, found.note_N, found.highest_N, found.decoded_N
    head = {"rows": num, "prefix": record.paths.prefix, "bytes": len(record.paths.data), "words": found.words}
    head["full_per_s"] = found.full_per_s
    packed = json.dumps(head).encode()
    numbers = [np.ascontiguousarray(column, kind).tobytes() for column, (_, kind) in zip(columns, _NUMBERS, strict=True)]
    starts, digests = record.paths.starts.astype("<i8").tobytes(), np.ascontiguousarray(found.digest_NB, np.uint8).tobytes()
    parts = [len(packed).to_bytes(8, "little"), packed, starts, *numbers, digests, record.paths.data]
    state = hashlib.blake2b(digest_size=_HASH_BYTES)
    for part in parts:
        state.update(part)
    return b"".join([MARK, sum(map(len, parts)).to_bytes(8, "little"), *parts, state.digest()])


def _blocks(file: Path, raw: memoryview) -> Iterator[Record]:
    at = 0
    while at < len(raw):
        begin = at + len(MARK) + 8
        length = int.from_bytes(raw[at + len(MARK) : begin], "little")
        content, check = raw[begin : begin + length], raw[begin + length : begin + length + _HASH_BYTES]
        whole = raw[at : at + len(MARK)] == MARK and len(check) == _HASH_BYTES
        if not whole or hashlib.blake2b(content, digest_size=_HASH_BYTES).digest() != check:
            _log.warning("%s is damaged from byte %d on, or was cut off; the images that it named there are read again", file, at)
            return
        at = begin + length + _HASH_BYTES
        yield _unpacked(content, at)


def _unpacked(content: memoryview, end: int) -> Record:
    at = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(bytes(content[8:at]))
    num, columns = head["rows"], {}
    numbers = [(name, kind, num) for name, kind in _NUMBERS]
    for name, kind, count in (("starts", "<i8", num + 1), *numbers, ("digest", "|u1", DIGEST_BYTES * num)):
        columns[name] = np.frombuffer(content, kind, count, at)
        at += columns[name].nbytes
    paths = Texts(bytes(content[at : at + head["bytes"]]), columns["starts"], head["prefix"])
    shown = columns["problem"], columns["note"], columns["highest"], columns["decoded"]
    found = Found(columns["digest"].reshape(num, DIGEST_BYTES), *shown, tuple(head["words"]), head["full_per_s"])
    return Record(paths, columns["size"], columns["time"], found, end=end)


def _old(file: Path) -> Record | None:
    """The record of tltrain 0.2: JSON with the keys path|size|time."""
    try:
        rows = [(*key.rsplit("|", 2), Scanned(*values)) for key, values in json.loads(file.read_bytes()).items()]
        paths, size_N = Texts.of(row[0] for row in rows), np.array([int(row[1]) for row in rows], np.int64)
        return Record(paths, size_N, np.array([int(row[2]) for row in rows], np.int64), Found.of(row[3] for row in rows), one_block=False)
    except (ValueError, TypeError, AttributeError, IndexError):
        _log.warning("%s is damaged; the images are read again", file)
        return None
