"""data.jsonl.gz of a run folder: the classes, and of every image the split, the class and the digest of its bytes.

A start that finds other images than the first one did must not draw the splits anew: it would test on images that it has trained on.
The first line describes the whole, each further line is one image, so that a million of them are read line by line.
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
"""In place of a split, for an image that the run leaves out."""
SHOWN = 3
"""Images that are named of each kind of difference."""


class Sample(NamedTuple):
    """One image. Of an open source, `split` is the one that the source itself declares."""

    id: str
    split: str
    label: str
    digest: str
    """Hash of its bytes; empty where the source has none for each image."""


@dataclass(frozen=True)
class DataRecord:
    """What the first line says."""

    classes: tuple[str, ...]
    fingerprint: str
    """Of the data as its source gives it, split by the recipe."""
    assigned: bool = False
    """Whether the splits are those of an earlier record, and not the ones that the recipe draws from the data as it is."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hash by input: `weights`, `teacher`."""


def write(run: Path, record: DataRecord, samples: Iterable[Sample]) -> None:
    """The file appears whole or not at all."""
    head = {"classes": record.classes, "fingerprint": record.fingerprint, "assigned": record.assigned, "inputs": dict(record.inputs)}
    with files.replacing(run / NAME) as temporary, gzip.open(temporary, "wb", compresslevel=1) as out:
        for line in (head, *samples):
            out.write(json.dumps(line).encode() + b"\n")


def read(run: Path) -> DataRecord | None:
    """None where the run has no such file: it has not begun, or by tltrain 0.1.0. Raises UserError for a damaged one."""
    if not (run / NAME).is_file():
        return None
    head = next(_lines(run), None)
    try:
        return DataRecord(tuple(head["classes"]), str(head["fingerprint"]), bool(head["assigned"]), dict(head["inputs"]))  # type: ignore[index]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(run, error) from error


def read_samples(run: Path) -> list[Sample]:
    """Every image of the record, in the order of its source. Raises UserError for a damaged file."""
    lines = _lines(run)
    next(lines, None)
    try:
        return [Sample(*map(str, line)) for line in lines]  # type: ignore[call-overload]
    except TypeError as error:
        raise _damaged(run, error) from error


def _lines(run: Path) -> Iterator[object]:
    try:
        with gzip.open(run / NAME, "rb") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:  # gzip has a checksum of its own
        raise _damaged(run, error) from error


def _damaged(run: Path, error: Exception) -> UserError:
    return UserError(
        f"{run / NAME} is damaged ({type(error).__name__}: {error}), and without it nobody can tell whether the images are those that this "
        "run was trained on; copy it from a backup, or choose a new folder with --folder"
    )


@dataclass(frozen=True)
class Difference:
    """What differs between the images of a record and those that are there now."""

    splits: tuple[str, ...]
    """(N,) of each image there now: its split in the record, or `UNUSED` for a new one."""
    kinds: Mapping[str, Sequence[str]]
    """The images by kind of difference, each described; kinds without any are left out."""
    classes: Sequence[str]
    """How the classes differ, in words; empty where they are the same."""

    @property
    def moved(self) -> Sequence[str]:
        return self.kinds.get(MOVED, ())

    def lines(self) -> list[str]:
        found = [
            f"{kind}: {len(names):,} ({', '.join([*names[:SHOWN], *['...'] * (len(names) > SHOWN)])})" for kind, names in self.kinds.items()
        ]
        return [*([f"classes: {'; '.join(self.classes)}"] if self.classes else []), *found]


ADDED, REMOVED, CHANGED = "new images", "images that are gone", "images with other bytes"
RENAMED, RELABELLED, MOVED = "renamed images", "images of another class", "images that stand in another split"


def compare(classes: Sequence[str], known: Sequence[Sample], classes_now: Sequence[str], now: Sequence[Sample]) -> Difference:
    """known: of the record. now: of the open source. An image is known by its name with its bytes, else by its bytes, else by its name."""
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
    found = {i for i in match if i is not None}
    kinds[REMOVED] = [sample.id for i, sample in enumerate(known) if i not in found]
    order = (ADDED, REMOVED, RENAMED, CHANGED, RELABELLED, MOVED)
    return Difference(tuple(splits), {kind: kinds[kind] for kind in order if kinds[kind]}, _class_changes(classes, classes_now))


def _matched(known: Sequence[Sample], now: Sequence[Sample]) -> list[int | None]:
    """(N,) which known image each is. Bytes count more than names: where files were numbered anew, a name says nothing."""
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
