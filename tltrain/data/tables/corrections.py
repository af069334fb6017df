"""data.exclude and data.relabel: images that a recipe leaves out, and images to which it gives another class."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from tltrain.core.errors import UserError, some
from tltrain.core.output import escape
from tltrain.core.recipe import Data
from tltrain.data.multilabel.label_sets import names_in, separator, set_as_listed
from tltrain.data.tables.rows import read_rows

EXCLUDE, RELABEL, LOOK = "exclude", "relabel", "look"
"""Values of the column `suggestion` in the doctor's table: exclude, relabel:CLASS, or look, which changes nothing."""
FORMS = {EXCLUDE: "path", RELABEL: "path,label"}
"""The columns of a table that a person writes."""


@dataclass(frozen=True)
class Corrected:
    """The samples of a source after exclusions and relabelling."""

    kept: list[int]
    """Positions of the samples that are not left out, in their order."""
    labels: list[str]
    """The class of each sample that is kept, or its set of labels."""
    notes: tuple[str, ...] = ()


class _Entry(NamedTuple):
    """One line of a table. place: the file and the line, for messages. label: the new class, or set of them; None: left out."""

    place: str
    path: str
    label: str | None


def corrected(spec: Data, ids: Sequence[str], labels: Sequence[str], paths: Sequence[str | Path] = ()) -> Corrected:
    """Apply data.exclude and data.relabel of a recipe to the samples of its source.

    ids, labels: (N,) name and class of each sample. paths: (N,) their files, if they are files; a table names an image by either.
    Of several labels an image, a label here is a set of them, written as in the source's table: cat|dog, or nothing for none of them.
    Raises UserError, with the line, for a path that is not among the samples or is named twice, and for a class that no sample has.
    """
    entries = {key: _entries(key, file, spec) for key, file in ((EXCLUDE, spec.exclude), (RELABEL, spec.relabel)) if file is not None}
    named = {os.path.normpath(entry.path) for table in entries.values() for entry in table}
    position = {key: i for names in (paths, ids) for i, name in enumerate(names) if (key := os.path.normpath(name)) in named}
    acting: dict[int, _Entry] = {}
    for entry in (entry for table in entries.values() for entry in table):
        i = position.get(os.path.normpath(entry.path))
        if i is None:
            near = get_close_matches(entry.path, ids, n=1)
            raise UserError(f"{entry.place}: {spec.source} has no image {entry.path}{f'; did you mean {near[0]}?' if near else ''}")
        first = acting.setdefault(i, entry)
        if first is not entry:
            raise UserError(f"{entry.place}: {entry.path} stands in {first.place} already; name each image once")
    _check_classes(acting.values(), _names(labels, spec), spec)
    new = [acting[i].label if i in acting else label for i, label in enumerate(labels)]
    kept, result = [i for i, label in enumerate(new) if label is not None], [label for label in new if label is not None]
    other = "other labels" if spec.multilabel else "another class"
    does = {EXCLUDE: "leaves out {:,} of {:,} images", RELABEL: f"gives {other} to {{:,}} of {{:,}} images"}
    notes = [f"data.{key} {does[key].format(len(table), len(ids))}" for key, table in entries.items()]
    if gone := sorted(_names(labels, spec) - _names(result, spec)):
        notes.append(f"data.exclude and data.relabel leave no image of class {some(gone)}")
    return Corrected(kept, result, tuple(notes))


def left_out(spec: Data) -> list[str]:
    """The images that data.exclude names, as it names them. Raises UserError for a table that cannot be read."""
    return [] if spec.exclude is None else [entry.path for entry in _entries(EXCLUDE, spec.exclude, spec)]


def _names(labels: Sequence[str], spec: Data) -> set[str]:
    """The classes that samples have, those in their sets, or those of the recipe's columns."""
    if spec.label_columns is not None:
        return set(spec.label_columns)
    return {name for label in set(labels) for name in names_in(label, spec)}


def _check_classes(entries: Iterable[_Entry], known: Collection[str], spec: Data) -> None:
    for place, name in ((each.place, name) for each in entries if each.label is not None for name in names_in(each.label, spec)):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {some(sorted(known))}"
            if spec.multilabel:
                hint += f"; a set is written with {separator(spec)!r} between its labels, and empty for none of them"
            raise UserError(f"{place}: no image is of class {name!r}; {hint}")


def _entries(key: str, given: str, spec: Data) -> list[_Entry]:
    """The lines of a table that act. With a column `suggestion`, as in the doctor's table, those that suggest `key`; else all."""
    file = Path(given).expanduser().absolute()
    rows, columns = read_rows(file, ["path"], f"data.{key} is {given}", FORMS[key])
    suggests = "suggestion" in columns
    if key == RELABEL and not suggests and "label" not in columns:
        raise UserError(f"{file} has the columns {some(columns)} and not label; the first line names: {FORMS[key]}")
    entries = []
    for line, row in rows:
        place = f"{file}, line {line}"
        action, colon, label = key, ":", row.get("label", "")
        if suggests:
            action, colon, label = (part.strip() for part in escape.from_csv(row["suggestion"]).partition(":"))
        _check_row(place, row, action, label, empty=spec.multilabel and bool(colon))
        if action == key:
            path = escape.from_csv(row["path"]) if suggests else row["path"]  # the doctor writes =1.png as '=1.png
            named = set_as_listed(label, spec, place) if spec.multilabel else label
            entries.append(_Entry(place, path, named if key == RELABEL else None))
    return entries


def _check_row(place: str, row: dict[str, str], action: str, label: str, empty: bool) -> None:
    """empty: whether a label may be: none of several, where a colon or a column says that one stands there."""
    if action not in (EXCLUDE, RELABEL, LOOK, ""):
        raise UserError(f"{place}: suggestion is {row['suggestion']!r}; it can be exclude, relabel:CLASS, or look, which changes nothing")
    if not row["path"]:
        raise UserError(f"{place}: path is empty; every line names an image")
    if action == RELABEL and not label and not empty:
        raise UserError(f"{place}: {row['path']} gets no class; write relabel:CLASS as its suggestion, or a class in the column label")
