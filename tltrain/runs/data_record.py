"""data.jsonl.gz of a run folder: the classes, and for each image its split, class and a hash of its bytes.

It lets a later start keep the same splits after images were added or removed. Splits drawn from the changed images would put training
images into the test split. The first line describes the data set, and each further line one image, so that large files can be streamed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tltrain.core import files
from tltrain.core.errors import UserError, some

NAME = "data.jsonl.gz"
UNUSED = "unused"
"""The `split` of an image that the run does not use."""
SHOWN = 3
"""Number of images listed for each kind of difference."""


class Sample(NamedTuple):
    """One image. If it comes from an open source, `split` is the one that the source declares."""

    id: str
    split: str
    label: str
    digest: str
    """Hash of its bytes. Empty if the source has no hash per image."""


@dataclass(frozen=True)
class DataRecord:
    """The first line of the file."""

    classes: tuple[str, ...]
    fingerprint: str
    """Hash of the source data, split as the recipe draws it."""
    assigned: bool = False
    """Whether the splits were taken from an earlier record. False: the recipe drew them from this data."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hash by input: `weights`, `teacher`."""


def write(run: Path, record: DataRecord, samples: Iterable[Sample]) -> None:
    """Write the file atomically."""
    head = {"classes": record.classes, "fingerprint": record.fingerprint, "assigned": record.assigned, "inputs": dict(record.inputs)}
    with files.replacing(run / NAME) as temporary, gzip.open(temporary, "wb", compresslevel=1) as out:
        for line in (head, *samples):
            out.write(json.dumps(line).encode() + b"\n")


def read(run: Path) -> DataRecord | None:
    """Parse the first line. None if there is no file: before the first start, and for tltrain 0.1.0. Raises UserError if damaged."""
    if not (run / NAME).is_file():
        return None
    head = next(iter([*_lines(run, only_head=True)]), None)
    try:
        return DataRecord(tuple(head["classes"]), str(head["fingerprint"]), bool(head["assigned"]), dict(head["inputs"]))  # type: ignore[index]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(run, error) from error


def read_samples(run: Path) -> list[Sample]:
    """All images of the record, in the order of their source. Raises UserError for a damaged file."""
    lines = _lines(run)
    next(lines, None)
    try:
        return [Sample(*map(str, line)) for line in lines]  # type: ignore[call-overload]
    except TypeError as error:
        raise _damaged(run, error) from error


def _lines(run: Path, only_head: bool = False) -> Iterator[object]:
    try:
        with files.open_regular(run / NAME) as packed, gzip.open(packed, "rb") as file:
            for number, line in enumerate(file):
                if number == 0 or not only_head:  # the others are read too: gzip's checksum stands at the end
                    yield json.loads(line)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:  # gzip verifies its own checksum
        raise _damaged(run, error) from error


def _damaged(run: Path, error: Exception) -> UserError:
    return UserError(
        f"{run / NAME} is damaged ({type(error).__name__}: {error}), and without it nobody can tell whether the images are those that this "
        "run was trained on; copy it from a backup, or choose a new folder with --folder"
    )


@dataclass(frozen=True)
class Difference:
    """The differences between the images of a record and the present images."""

    splits: tuple[str, ...]
    """(N,) the split of each present image according to the record, or `UNUSED` for a new one."""
    kinds: Mapping[str, Sequence[str]]
    """Descriptions of the images by kind of difference. Kinds without images are left out."""
    classes: Sequence[str]
    """Differences of the classes, as text. Empty if they are the same."""

    @property
    def moved(self) -> Sequence[str]:
        return self.kinds.get(MOVED, ())

    def lines(self) -> list[str]:
        counts = [
            f"{kind}: {len(names):,} ({', '.join([*names[:SHOWN], *['...'] * (len(names) > SHOWN)])})" for kind, names in self.kinds.items()
        ]
        return [*([f"classes: {'; '.join(self.classes)}"] if self.classes else []), *counts]


ADDED, REMOVED, CHANGED = "new images", "images that are gone", "images with other bytes"
RENAMED, RELABELLED, MOVED = "renamed images", "images of another class", "images that stand in another split"


def compare(classes: Sequence[str], known: Sequence[Sample], classes_now: Sequence[str], now: Sequence[Sample]) -> Difference:
    """Compare the images of a record (known) with those of the open source (now).

    Images are matched by name and bytes first, then by bytes, then by name.
    """
    match = _matched(known, now)
    declared = {sample.split for sample in now} - {"train"}
    kinds: dict[str, list[str]] = defaultdict(list)
    splits = []
    for sample, i in zip(now, match, strict=True):
        old = None if i is None else known[i]
        splits.append(UNUSED if old is None else old.split)
        if old is None:
            kinds[ADDED].append(sample.id)
            continue
        if old.id != sample.id:
            kinds[RENAMED].append(f"{old.id} -> {sample.id}")
        if old.digest != sample.digest:
            kinds[CHANGED].append(sample.id)
        if old.label != sample.label:
            kinds[RELABELLED].append(f"{sample.id}: {old.label} -> {sample.label}")
        if old.split != UNUSED and sample.split != old.split and (sample.split in declared or old.split in declared):
            kinds[MOVED].append(f"{sample.id}: {old.split} -> {sample.split}")
    matched = {i for i in match if i is not None}
    kinds[REMOVED] = [sample.id for i, sample in enumerate(known) if i not in matched]
    order = (ADDED, REMOVED, RENAMED, CHANGED, RELABELLED, MOVED)
    return Difference(tuple(splits), {kind: kinds[kind] for kind in order if kinds[kind]}, _class_changes(classes, classes_now))


def _matched(known: Sequence[Sample], now: Sequence[Sample]) -> list[int | None]:
    """(N,) the index of the matching known image, or None. Bytes have priority over names, since files may have been renumbered."""
    match: list[int | None] = [None] * len(now)
    free = set(range(len(known)))

    def by(key: Callable[[Sample], object]) -> None:
        places: dict[object, list[int]] = defaultdict(list)
        for i in sorted(free, reverse=True):
            places[key(known[i])].append(i)
        for position, sample in enumerate(now):
            if match[position] is None and (mine := key(sample)) is not None and places.get(mine):
                match[position] = i = places[mine].pop()
                free.discard(i)

    by(lambda sample: (sample.id, sample.digest))
    if free:
        by(lambda sample: (sample.digest, sample.label) if sample.digest else None)
        by(lambda sample: sample.digest or None)
        by(lambda sample: sample.id)
    return match


def _class_changes(old: Sequence[str], new: Sequence[str]) -> list[str]:
    gone, came = [name for name in old if name not in set(new)], [name for name in new if name not in set(old)]
    texts = [f"{some(names)} {what}" for names, what in ((gone, "gone"), (came, "new")) if names]
    return texts or (["in another order"] if tuple(old) != tuple(new) else [])
