"""Builds a source from a list of image files: scans them and leaves out unreadable ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tltrain.core.errors import UserError, some
from tltrain.core.recipe import Data
from tltrain.data.dataset import Read, Source
from tltrain.data.decode import read_image
from tltrain.data.sources.names import doubtful
from tltrain.data.sources.scan import Scanned, check_readable, odd_ones, scan, white_notes
from tltrain.data.tables.corrections import corrected


class Listed(NamedTuple):
    """One image file with its id, split, label and group, as listed by a folder or a table."""

    path: Path
    id: str
    split: str
    label: str
    group: str = ""
    """Samples of one group stay in one split. Empty: byte-identical images form a group."""


@dataclass(frozen=True)
class FileReader:
    """Reads the image file with a number. Picklable."""

    paths: tuple[str, ...]
    white: int | None = None
    """data.white of the recipe."""

    def __call__(self, number: int) -> Image.Image:
        return read_image(Path(self.paths[number]), self.white)


Look = Callable[[Sequence[int]], tuple[list[Scanned], Read]]
"""Given the positions of the listed images that are used: what a scan says of each, and what reads the n-th of them."""


def from_files(
    listed: Sequence[Listed], origin: str, spec: Data, notes: tuple[str, ...], look: Look | None = None, order: Sequence[str] = ()
) -> Source:
    """The source of these images. Raises UserError for too many unreadable ones, and for fewer than two classes.

    look: for images that are no files of their own; their paths are names in messages alone. order: of the classes, where it is not that
    of the alphabet.
    """
    kept = list(range(len(listed)))
    if spec.exclude is not None or spec.relabel is not None:
        columns = [sample.id for sample in listed], [sample.label for sample in listed], [sample.path for sample in listed]
        changed = corrected(spec, *columns)
        kept = changed.kept
        listed = [listed[i]._replace(label=label) for i, label in zip(changed.kept, changed.labels, strict=True)]
        notes += changed.notes
    place = {name: k for k, name in enumerate(order)}
    classes = tuple(sorted({sample.label for sample in listed}, key=lambda name: (place.get(name, len(place)), name)))
    if len(classes) < 2:
        raise UserError(f"{origin} has {len(classes)} class ({', '.join(classes)}); training needs at least two")
    paths = [sample.path for sample in listed]
    scanned, read = look(kept) if look else (scan(paths, origin, spec.white), FileReader(tuple(map(str, paths)), spec.white))
    notes += (
        *check_readable(scanned, paths, spec.max_unreadable, origin),
        *odd_ones(scanned, paths),
        *white_notes(scanned, paths, spec.white),
    )
    numbers = np.array([i for i, result in enumerate(scanned) if not result.problem], dtype=np.int64)
    readable = [listed[i] for i in numbers]
    digests = tuple(scanned[i].digest for i in numbers)
    number_of = {name: k for k, name in enumerate(classes)}
    label_N = np.array([number_of[s.label] for s in readable], dtype=np.int64)
    notes += (*doubtful(classes, label_N), *_two_labels(readable, digests))
    groups = [f"group {s.group}" if s.group else digest for s, digest in zip(readable, digests, strict=True)]
    return Source(
        classes=classes,
        labels=label_N,
        ids=tuple(s.id for s in readable),
        numbers=numbers,
        declared=np.array([s.split for s in readable]),
        groups=_numbered(groups),
        read=read,
        fingerprint=_fingerprint(readable, digests, spec.white),
        digests=digests,
        notes=notes,
        corrected=True,
    )


def _two_labels(samples: Sequence[Listed], digests: Sequence[str]) -> tuple[str, ...]:
    """A note on byte-identical images with different labels, in any split."""
    first: dict[str, Listed] = {}
    pairs = []
    for sample, digest in zip(samples, digests, strict=True):
        other = first.setdefault(digest, sample)
        if other.label != sample.label:
            pairs.append(f"{other.id} ({other.label}) = {sample.id} ({sample.label})")
    one = len(pairs) == 1
    counted = f"{len(pairs)} pair{'s' * (not one)} of byte-identical images stand{'s' * one} under two labels"
    return (f"{counted}, so that one of them is wrong: {some(pairs)}",) if pairs else ()


def _numbered(groups: Sequence[str]) -> np.ndarray:
    """Group numbers (N,) int64, in order of first appearance."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(group, len(seen)) for group in groups], dtype=np.int64)


def _fingerprint(samples: Sequence[Listed], digests: Sequence[str], white: int | None) -> str:
    """Hash of the samples, their contents and their white. Ids are relative paths, so moving the data keeps the fingerprint."""
    state = hashlib.blake2b(b"" if white is None else f"white {white}".encode(), digest_size=16)
    for sample, digest in zip(samples, digests, strict=True):
        state.update(repr((sample.id, sample.split, sample.label, sample.group, digest)).encode())
    return state.hexdigest()
