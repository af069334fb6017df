"""Builds a source from a list of image files: scans them and leaves out unreadable ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path

import numpy as np
from PIL import Image

from tltrain.core.errors import LISTED, UserError, some
from tltrain.core.recipe import Data
from tltrain.data.dataset import Read, Source
from tltrain.data.decode import read_image
from tltrain.data.multilabel.label_sets import classes_of, matrix
from tltrain.data.scans.found import Found, Scanned
from tltrain.data.sources.names import doubtful
from tltrain.data.sources.scan import check_notes, check_readable, odd_ones, scan, white_notes
from tltrain.data.tables.corrections import corrected
from tltrain.data.tables.listing import Listed, Listing
from tltrain.data.tables.texts import PART, Texts, same_as


@dataclass(frozen=True)
class FileReader:
    """Reads the image file with a number. Picklable."""

    paths: Sequence[str]
    white: int | None = None
    """data.white of the recipe."""
    check: str = "full"
    """data.check of the recipe."""

    def __call__(self, number: int) -> Image.Image:
        try:
            return read_image(Path(self.paths[number]), self.white)
        except UserError as error:
            if self.check == "full":
                raise
            raise UserError(
                f"{error}. data.check is {self.check}, so that not every image was decoded before: data.check: full finds such files and "
                "leaves them out before the first step"
            ) from error


Look = Callable[[Sequence[int]], tuple[list[Scanned], Read]]
"""Given the positions of the listed images that are used: what a scan says of each, and what reads the n-th of them."""


def from_files(
    listed: Sequence[Listed], origin: str, spec: Data, notes: tuple[str, ...], look: Look | None = None, order: Sequence[str] = (),
    labelled: bool = True,
) -> Source:  # fmt: skip
    """The source of these images. Raises UserError for too many unreadable ones, and for fewer than two classes of one an image.

    look: for images that are no files of their own; their paths are names in messages alone. order: of the classes, where it is not that
    of the alphabet. labelled: whether there must be classes.
    """
    listing = Listing.of(listed)
    kept = np.arange(len(listing))
    if spec.exclude is not None or spec.relabel is not None:
        changed = corrected(spec, listing.ids, listing.label_names(), listing.paths)
        kept = np.array(changed.kept, dtype=np.int64)
        listing = listing.take(kept).with_labels(changed.labels)
        notes += changed.notes
    _check_groups(listing, origin)
    place = {name: k for k, name in enumerate(order)}
    present = [listing.labels[k] for k in np.flatnonzero(np.bincount(listing.label_N)).tolist()]
    classes = classes_of(present, spec) if spec.multilabel else tuple(sorted(present, key=lambda name: (place.get(name, len(place)), name)))
    if labelled and not spec.multilabel and len(classes) < 2:  # of several labels the split asks: one is enough to be evaluated
        raise UserError(f"{origin} has {len(classes)} class ({', '.join(classes)}); training needs at least two")
    found, read = _looked(listing, kept, origin, spec, look)
    unreadable = check_readable(found, listing.paths, spec.max_unreadable, origin)
    notes += (
        *unreadable,
        *odd_ones(found, listing.paths),
        *white_notes(found, listing.paths, spec.white),
        *(check_notes(found, spec.check) if look is None else _unused_check(origin, spec)),
    )
    numbers = np.flatnonzero(found.problem_N == 0)
    readable, digests = listing.take(numbers), found.take(numbers).digests("" if look is not None or spec.check == "full" else "~")
    label_N = _labels(listing, present, classes, spec)[readable.label_N]
    first_N = same_as(digests)
    notes += (*doubtful(classes, label_N), *_two_labels(readable, digests, first_N))
    return Source(
        classes=classes,
        labels=label_N,
        ids=readable.ids,
        numbers=numbers,
        declared=np.array(readable.splits)[readable.split_N],
        groups=_groups(readable, digests, first_N),
        read=read,
        fingerprint=_fingerprint(readable, digests, spec.white, classes if spec.multilabel else ()),
        digests=digests,
        notes=notes,
        unreadable=unreadable,
        corrected=True,
    )


def _labels(listing: Listing, present: Sequence[str], classes: Sequence[str], spec: Data) -> np.ndarray:
    """`Split.labels` for each of the listing's labels: the number of its class, or a row of ones and zeros."""
    if spec.multilabel:
        return matrix(listing.labels, classes, spec)
    return np.array([classes.index(name) if name in present else -1 for name in listing.labels], np.int64)


def _check_groups(listing: Listing, origin: str) -> None:
    if (torn := torn_group(listing)) is not None:
        image, other = listing[torn[0]], listing[torn[1]]
        raise UserError(
            f"{origin}: group {image.group} is in {image.split} ({image.id}) and in {other.split} ({other.id}); a group stays in one "
            "split: move it, or leave those images out with data.exclude"
        )


def torn_group(listing: Listing) -> tuple[int, int] | None:
    """(an image, the first one of its group), where the two are declared in different splits. None: there is no such group."""
    if listing.groups is None or len(listing.splits) < 2:
        return None
    first_N = same_as(listing.groups)
    torn = (i for i in np.flatnonzero(listing.split_N != listing.split_N[first_N]).tolist() if listing.groups[i] != "")
    return next(((i, int(first_N[i])) for i in torn), None)


def _looked(listing: Listing, kept: np.ndarray, origin: str, spec: Data, look: Look | None) -> tuple[Found, Read]:
    if look is not None:
        scanned, read = look(kept.tolist())
        return Found.of(scanned), read
    return scan(listing.paths, origin, spec.white, spec.check), FileReader(listing.paths, spec.white, spec.check)


def _unused_check(origin: str, spec: Data) -> tuple[str, ...]:
    if spec.check == "full":
        return ()
    return (f"data.check is {spec.check}, and {origin} is read in full: the check is of images that are files of their own",)


def _two_labels(samples: Listing, digests: Texts, first_N: np.ndarray) -> tuple[str, ...]:
    """A note on byte-identical images with different labels, in any split."""
    pairs = np.flatnonzero(samples.label_N[first_N] != samples.label_N)
    shown = [(samples[first], samples[i]) for i, first in zip(pairs[:LISTED].tolist(), first_N[pairs[:LISTED]].tolist(), strict=True)]
    names = [f"{other.id} ({other.label}) = {sample.id} ({sample.label})" for other, sample in shown]
    one, alike = len(pairs) == 1, "byte-identical images" if not digests.prefix else "images of the same size, beginning and end"
    counted = f"{len(pairs)} pair{'s' * (not one)} of {alike} stand{'s' * one} under two labels"
    return (f"{counted}, so that one of them is wrong: {some(names, len(pairs))}",) if len(pairs) else ()


def _groups(samples: Listing, digests: Texts, first_N: np.ndarray) -> np.ndarray:
    """Group numbers (N,) int64, in order of first appearance. Images without a group are one with those of the same bytes.

    first_N: (N,) the first image of the same bytes.
    """
    if samples.groups is not None:
        first_N = same_as([f"group {group}" if group else digest for group, digest in zip(samples.groups, digests, strict=True)])
    return (np.cumsum(first_N == np.arange(len(first_N))) - 1)[first_N]


def _fingerprint(samples: Listing, digests: Texts, white: int | None, classes: Sequence[str]) -> str:
    """Hash of the samples, their contents, their white, and the classes that an image may have several of.

    Ids are relative paths, so moving the data keeps the fingerprint.
    """
    state = hashlib.blake2b(b"" if white is None else f"white {white}".encode(), digest_size=16)
    state.update(repr(classes).encode() if classes else b"")
    groups = repeat("", len(samples)) if samples.groups is None else samples.groups
    rows = zip(samples.ids, samples.split_names(), samples.label_names(), groups, digests, strict=True)
    while part := "".join(map(repr, islice(rows, PART))):
        state.update(part.encode())
    return state.hexdigest()
