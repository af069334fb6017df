"""A million names in one buffer: as Python strings they would take thrice the memory, and a pickle would hold an object for each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import overload

import numpy as np

PART = 65536
"""Names processed at a time, so that little memory is used beside the buffer."""


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
            part = self.data[bounds[0] : bounds[-1]]
            if part.isascii():  # bytes and characters are counted alike: one decoding for all of them
                text, low = part.decode(), bounds[0]
                yield from [self.prefix + text[first - low : end - low] for first, end in pairwise(bounds)]
            else:
                yield from [self.prefix + self.data[first:end].decode("utf-8", "surrogateescape") for first, end in pairwise(bounds)]

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
    if isinstance(texts, Texts) and (first_N := _same_hashes(texts)) is not None:
        return first_N
    _, first, group = np.unique(np.array(list(texts), dtype=object), return_index=True, return_inverse=True)
    return first[group.ravel()].astype(np.int64)


def _same_hashes(texts: Texts) -> np.ndarray | None:
    """`same_as` for texts of one length that eight divides, as hashes have: they are sorted as numbers. None for others."""
    num, length = len(texts), len(texts.data) // len(texts)
    if length == 0 or length % 8 or not np.all(np.diff(texts.starts) == length):
        return None
    word_NW = np.frombuffer(texts.data, np.uint64).reshape(num, -1)
    key_N = np.zeros(num, np.uint64)
    for word_N in word_NW.T:
        key_N = key_N * np.uint64(0x9E3779B97F4A7C15) + word_N
    order_N = np.argsort(key_N, kind="stable")
    sorted_N = key_N[order_N]
    is_new_N = np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]])
    first_N = np.empty(num, np.int64)
    first_N[order_N] = order_N[np.maximum.accumulate(np.where(is_new_N, np.arange(num), 0))]
    return first_N if np.array_equal(word_NW[first_N], word_NW) else None  # None: two of them share a key by chance
