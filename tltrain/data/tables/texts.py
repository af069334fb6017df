"""A million names in one buffer: as Python strings they would take thrice the memory, and a pickle would hold an object for each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import overload

import numpy as np

PART = 65536
"""Names that are worked on at a time, so that little is held beside the buffer."""


class Texts(Sequence[str]):
    """(N,) strings as one buffer of UTF-8 and the place of each. It equals any sequence of the same strings. Cannot be changed."""

    __slots__ = ("data", "prefix", "starts")

    def __init__(self, data: bytes, starts: np.ndarray, prefix: str = "") -> None:
        """data: all texts one behind the other, UTF-8. starts: (N + 1,) int64, where each begins, and the last ends. prefix: of each."""
        self.data, self.starts, self.prefix = data, starts, prefix

    @classmethod
    def of(cls, texts: Iterable[str], prefix: str = "") -> Texts:
        """The texts, which stand without the prefix. They may come from a generator: a part of them is held at a time."""
        if isinstance(texts, Texts) and not prefix:
            return texts
        rest, data, lengths = iter(texts), bytearray(), [np.zeros(1, np.int64)]
        while part := list(islice(rest, PART)):
            encoded = [text.encode("utf-8", "surrogateescape") for text in part]
            data += b"".join(encoded)
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        return cls(bytes(data), np.cumsum(np.concatenate(lengths)), prefix)

    def with_prefix(self, prefix: str) -> Texts:
        """The same texts, without a copy, behind another prefix."""
        return Texts(self.data, self.starts, prefix)

    def take(self, positions: np.ndarray) -> Texts:
        """The texts at these positions (M,) int64."""
        num = len(self)
        if len(positions) == num and np.array_equal(positions, np.arange(num)):
            return self
        raw, parts, lengths = np.frombuffer(self.data, np.uint8), [], [np.zeros(1, np.int64)]
        for begin in range(0, len(positions), PART):
            chosen = positions[begin : begin + PART]
            length_M = self.starts[chosen + 1] - self.starts[chosen]
            ends_M = np.cumsum(length_M)
            within = np.arange(ends_M[-1]) - np.repeat(ends_M - length_M, length_M)
            parts.append(raw[np.repeat(self.starts[chosen], length_M) + within].tobytes())
            lengths.append(length_M)
        return Texts(b"".join(parts), np.cumsum(np.concatenate(lengths)), self.prefix)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Texts: ...
    def __getitem__(self, place: int | slice) -> str | Texts:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        i = int(place)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"{place} of {len(self)} texts")
        return self.prefix + self.data[self.starts[i] : self.starts[i + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), PART):
            bounds = self.starts[begin : begin + PART + 1].tolist()
            for first, end in pairwise(bounds):
                yield self.prefix + self.data[first:end].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts) and other.prefix == self.prefix:
            return self.data == other.data and np.array_equal(self.starts, other.starts)
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))  # as that of the tuple that it equals

    def __repr__(self) -> str:
        shown = ", ".join(repr(text) for text in self[:3])
        return f"Texts({len(self)}: {shown}{', ...' if len(self) > 3 else ''})"

    def __reduce__(self) -> tuple[type[Texts], tuple[bytes, np.ndarray, str]]:
        return Texts, (self.data, self.starts, self.prefix)


class Growing:
    """Texts that are added one at a time."""

    def __init__(self) -> None:
        self.data, self.starts = bytearray(), array("q", [0])

    def add(self, text: str) -> None:
        self.data += text.encode("utf-8", "surrogateescape")
        self.starts.append(len(self.data))

    def texts(self, prefix: str = "") -> Texts:
        return Texts(bytes(self.data), np.frombuffer(self.starts, np.int64).copy(), prefix)


def joined(parts: Sequence[Texts]) -> Texts:
    """Texts without a prefix, one behind the other."""
    lengths = [np.diff(part.starts) for part in parts]
    return Texts(b"".join(part.data for part in parts), np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths])))


def same_as(texts: Sequence[str]) -> np.ndarray:
    """(N,) int64: for each text the position of the first that equals it, which is its own where none before does."""
    if len(texts) == 0:
        return np.zeros(0, np.int64)
    keys = np.array(texts, dtype=object) if not isinstance(texts, Texts) else _keys(texts)
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return first[group.ravel()].astype(np.int64)


def _keys(texts: Texts) -> np.ndarray:
    """What sorts as fast as numbers where all texts are as long as each other, as hashes are."""
    length = len(texts.data) // len(texts)
    if length and np.all(np.diff(texts.starts) == length):
        return np.frombuffer(texts.data, f"S{length}")  # hexadecimal digits: no zero at the end, which numpy would take off
    return np.array(list(texts), dtype=object)
