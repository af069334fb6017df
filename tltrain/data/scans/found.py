"""Scan results of N files, as columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tltrain.data.tables.listing import Names
from tltrain.data.tables.texts import Texts

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Scanned:
    """Scan result of one file: the hash of its bytes, and the problem if it cannot be used."""

    digest: str
    problem: str | None
    note: str | None = None
    """An oddity of a usable image, such as being all black."""
    highest: int | None = None
    """The largest stored value of a grey image whose white is data.white."""
    decoded: bool = True
    """Whether all of it was read and decoded. If not, the hash is of its size, its beginning and its end."""


@dataclass(frozen=True, eq=False)
class Found:
    """(N,) scan results."""

    digest_NB: np.ndarray
    """(N, 16) uint8, the hash of each file. Zeros where it could not be read."""
    problem_N: np.ndarray
    """(N,) int32, the number among `words` of what prevents its use. 0: nothing."""
    note_N: np.ndarray
    """(N,) int32, the number among `words` of its oddity. 0: none."""
    highest_N: np.ndarray
    """(N,) int32, as `Scanned.highest`. -1: none."""
    decoded_N: np.ndarray
    """(N,) bool, as `Scanned.decoded`."""
    words: tuple[str, ...] = ("",)
    full_per_s: float = 0.0
    """Images that were read and decoded a second, where that was measured."""

    @classmethod
    def of(cls, results: Iterable[Scanned]) -> Found:
        rows, word = list(results), Names()
        word("")
        digests = b"".join(bytes.fromhex(row.digest).ljust(DIGEST_BYTES, b"\0") for row in rows)
        digest_NB = np.frombuffer(digests, np.uint8).reshape(len(rows), DIGEST_BYTES)
        problem_N = np.array([word(row.problem or "") for row in rows], np.int32)
        note_N = np.array([word(row.note or "") for row in rows], np.int32)
        highest_N = np.array([-1 if row.highest is None else row.highest for row in rows], np.int32)
        return cls(digest_NB, problem_N, note_N, highest_N, np.array([row.decoded for row in rows], bool), tuple(word))

    @classmethod
    def joined(cls, parts: Sequence[Found]) -> Found:
        """One behind the other."""
        word, problems, notes = Names(), [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        word("")
        for part in parts:
            number = np.array([word(text) for text in part.words], np.int32)
            problems.append(number[part.problem_N])
            notes.append(number[part.note_N])
        empty = cls.of([])
        digest_NB, highest_N, decoded_N = (
            np.concatenate([getattr(part, name) for part in (empty, *parts)]) for name in ("digest_NB", "highest_N", "decoded_N")
        )
        return cls(digest_NB, np.concatenate(problems), np.concatenate(notes), highest_N, decoded_N, tuple(word))

    def take(self, rows: np.ndarray) -> Found:
        """The results of these rows (M,) int64."""
        columns = self.digest_NB, self.problem_N, self.note_N, self.highest_N, self.decoded_N
        digest_MB, problem_M, note_M, highest_M, decoded_M = (column[rows] for column in columns)
        return Found(digest_MB, problem_M, note_M, highest_M, decoded_M, self.words, self.full_per_s)

    def digests(self, prefix: str = "") -> Texts:
        """(N,) hashes in hexadecimal, each behind the prefix."""
        return Texts(self.digest_NB.tobytes().hex().encode(), 2 * DIGEST_BYTES * np.arange(len(self) + 1, dtype=np.int64), prefix)

    def __len__(self) -> int:
        return len(self.problem_N)
