"""The source csv:FILE: a table with the columns path and label, and optionally split and group."""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tltrain.core.errors import UserError, some
from tltrain.core.output import progress
from tltrain.core.recipe import Data
from tltrain.core.schema.data import is_url
from tltrain.data.dataset import Source, SourceKind
from tltrain.data.multilabel.label_sets import set_in_cell, set_in_columns
from tltrain.data.remote.copies import copied, images_of
from tltrain.data.sources.image_list import from_files, torn_group
from tltrain.data.sources.layout import split_of
from tltrain.data.sources.names import MISSING, counted, joined
from tltrain.data.tables.listing import Listing, Names
from tltrain.data.tables.rows import stream_rows
from tltrain.data.tables.texts import Growing, Texts

REPORTED = 10_000
"""Lines between two reports of progress."""
COLUMNS = ("path", "label", "split", "group")
FORM = "path,label[,split][,group]"
FORM_WITHOUT_LABELS = "path[,split]"
FORM_OF_COLUMNS = "path,{}[,split][,group]"
"""Of several labels: a column of ones and zeros for each class (data.label_columns)."""


_ODD = re.compile(r"^~|\\|//|(^|/)\.\.?(/|$)|/$")
"""Paths that pathlib writes in another way, or that may be another path: ~, \\, // and . or .. between slashes."""


def open_csv(argument: str, spec: Data, labelled: bool = True) -> Source:
    """Open a CSV file. Relative paths are relative to its folder. Raises UserError, with the line, for an inconsistent table.

    labelled: whether its labels are read; without them the column path is enough.
    """
    is_remote = is_url(argument)
    file = copied(argument) if is_remote else Path(argument).expanduser().absolute()
    needed: tuple[str, ...] = COLUMNS[:2]
    form = FORM
    if spec.label_columns is not None:
        needed, form = ("path", *(name.lower() for name in spec.label_columns)), FORM_OF_COLUMNS.format(",".join(spec.label_columns))
    if not labelled:
        needed, form = ("path",), FORM_WITHOUT_LABELS
    columns, rows = stream_rows(file, needed, f"data.source is csv:{file}", form)
    table = _Table(file, columns, spec, labelled)
    for line, values in rows:
        if is_remote and (is_url(path := values[table.place["path"]]) or _goes_above(path)):
            raise UserError(f"{argument}, line {line}: path is {path}; a remote table names images beside it, such as cat/1.jpg")
        table.add(line, values)
        if line % REPORTED == 0:
            progress.report(f"{line:,} lines read")
    if not table.lines:
        raise UserError(f"{file} has no line below the names of its columns; each further line names an image: {form}")
    listing = table.listing()
    _check(file, np.frombuffer(table.lines, np.int64), np.frombuffer(table.keys, np.int64), listing, spec, labelled)
    if is_remote:
        images_of(argument, listing.paths)
    notes = _notes(columns, ("path", "split", "group", *needed), table.num_with_slashes, listing)
    if labelled and not spec.multilabel and (note := joined(listing.labels)):
        notes = (*notes, note)
    return from_files(listing, f"csv:{file}", spec, notes, labelled=labelled)


class _Table:
    """The rows of a table as columns."""

    def __init__(self, file: Path, columns: list[str], spec: Data, labelled: bool) -> None:
        self.file, self.folder, self.spec = file, str(file.parent).rstrip("/"), spec
        self.labelled = labelled
        self.label_places = [columns.index(name.lower()) for name in spec.label_columns or ()]
        self.place = {name: columns.index(name) for name in COLUMNS if name in columns}
        self.ids, self.groups, self.labels, self.splits = Growing(), Growing(), Names(), Names()
        self.label_numbers, self.split_numbers = array("q"), array("q")
        self.lines = array("q")
        """The line of each row, from 1."""
        self.keys = array("q")
        """A hash of each path, whichever way it is written."""
        self.odd: dict[int, str] = {}
        """Paths that are not the folder and the id, by row."""
        self.num_with_slashes = 0
        self._split_of: dict[str, int] = {}
        self._key_of = os.path.normpath(self.folder or "/").rstrip("/")

    def add(self, line: int, values: list[str]) -> None:
        place = self.place
        written, label = values[place["path"]], self._label(line, values)
        one_class = self.labelled and not self.spec.multilabel
        if not written or (not label and one_class):
            empty = [column for column, value in zip(COLUMNS[:2], (written, label), strict=True) if not value]
            what = "path and a label" if one_class else "path"
            raise UserError(f"{self.file}, line {line}: {some(empty if one_class else empty[:1])} is empty; every line needs a {what}")
        self.split_numbers.append(self._split(line, values[place["split"]]) if "split" in place else self.splits("train"))
        self.label_numbers.append(self.labels(label))
        if "group" in place:
            self.groups.add(values[place["group"]])
        if _ODD.search(written) is None and written[0] != "/":
            self.ids.add(written)
            self.keys.append(hash(f"{self._key_of}/{written}"))
        else:
            path, name = _resolve(self.file.parent, written)
            self.odd[len(self.lines)] = str(path)
            self.num_with_slashes += name != written
            self.ids.add(name)
            self.keys.append(hash(os.path.normpath(path)))
        self.lines.append(line)

    def _label(self, line: int, values: list[str]) -> str:
        """The class, or the set of them where the recipe reads several labels. Empty where labels are not read."""
        if not self.labelled:
            return ""
        if self.spec.label_columns is not None:
            return set_in_columns([values[k] for k in self.label_places], self.spec.label_columns, f"{self.file}, line {line}")
        cell = values[self.place["label"]]
        if self.spec.label_separator is not None:
            return set_in_cell(cell, self.spec.label_separator, f"{self.file}, line {line}")
        return cell

    def _split(self, line: int, name: str) -> int:
        if name not in self._split_of:
            split = split_of(name)
            if split is None:
                raise UserError(f"{self.file}, line {line}: split is {name!r}; it must be train, val or test")
            self._split_of[name] = self.splits(split)
        return self._split_of[name]

    def listing(self) -> Listing:
        ids, prefix = self.ids.texts(), f"{self.folder}/"
        paths = ids.with_prefix(prefix)
        if self.odd:
            paths = Texts.of(self.odd.get(i) or prefix + name for i, name in enumerate(ids))
        split_N, label_N = np.array(self.split_numbers), np.array(self.label_numbers)
        groups = self.groups.texts() if self.groups.data else None
        return Listing(paths, ids, split_N, tuple(self.splits), label_N, tuple(self.labels), groups)


def _resolve(folder: Path, written: str) -> tuple[Path, str]:
    r"""The image file and its name. Expands ~. Replaces \ by / where only that path exists."""
    try:
        path = folder / Path(written).expanduser()
    except RuntimeError:  # ~x without a user x
        path = folder / written
    if "\\" in written and not os.path.lexists(path):
        with_slashes = written.replace("\\", "/")
        if os.path.lexists(folder / with_slashes):
            return folder / with_slashes, with_slashes
    return path, written


def _check(file: Path, line_N: np.ndarray, key_N: np.ndarray, listing: Listing, spec: Data, labelled: bool) -> None:
    """Raise UserError for a path listed twice, a group in two splits, or a class (not of several labels) without training images.

    key_N: (N,) a hash of each path.
    """
    _, inverse_N, count_N = np.unique(key_N, return_inverse=True, return_counts=True)
    firsts: dict[str, int] = {}
    for i in np.flatnonzero(count_N[inverse_N.ravel()] > 1).tolist():
        first = firsts.setdefault(os.path.normpath(listing.paths[i]), i)
        if first != i and _is_same(Path(listing.paths[first]), Path(listing.paths[i])):
            spelt = "" if listing.ids[first] == listing.ids[i] else f" as {listing.ids[first]}"
            raise UserError(
                f"{file}, line {line_N[i]}: {listing.ids[i]} stands in line {line_N[first]} already{spelt}; list each image once"
            )
    if (torn := torn_group(listing)) is not None:
        image, other = listing[torn[0]], listing[torn[1]]
        raise UserError(
            f"{file}, line {line_N[torn[0]]}: group {image.group} is in {image.split}, and in line {line_N[torn[1]]} in {other.split}; "
            "a group stays in one split"
        )
    train = listing.splits.index("train") if "train" in listing.splits else -1
    absent = sorted(
        set(listing.labels) - {listing.labels[k] for k in np.flatnonzero(np.bincount(listing.label_N[listing.split_N == train])).tolist()}
    )
    if absent and labelled and not spec.multilabel:  # a set of labels is no class
        raise UserError(f"{file}: no line of split train for class {some(absent)}; every class needs training images")


def _goes_above(written: str) -> bool:
    """Whether a relative path goes up at any place."""
    return written[:1] != "/" and ".." in re.split(r"[/\\]", written)


def _is_same(path: Path, other: Path) -> bool:
    """Whether two paths with the same normal form are one file. a/../x may differ from x where a is a link."""
    try:
        return path == other or path.samefile(other)
    except OSError:
        return True


def _notes(columns: list[str], used: Sequence[str], num_with_slashes: int, listing: Listing) -> tuple[str, ...]:
    notes = []
    unused = [column or "one without a name" for column in columns if column not in used]
    if unused:
        notes.append(f"columns that are not used: {some(unused)}")
    if num_with_slashes:
        notes.append(f"{num_with_slashes} of the paths are written with \\ and are read with /")
    for group, num in sorted(Counter(group for group in listing.groups or () if group.casefold() in MISSING).items()):
        notes.append(f"{counted(num)} of group {group!r}, which reads like a missing value: they stay together as one group")
    return tuple(notes)


CSV = SourceKind(lambda argument, spec, root: open_csv(argument or "", spec), argument="PATH", multilabel=True)
