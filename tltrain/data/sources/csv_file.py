"""The source csv:FILE: a table with the columns path and label, and optionally split and group."""

from __future__ import annotations

import os
from pathlib import Path

from tltrain.core.errors import UserError, some
from tltrain.core.recipe import Data
from tltrain.data.dataset import Source, SourceKind
from tltrain.data.sources.image_list import Listed, from_files
from tltrain.data.sources.layout import split_of
from tltrain.data.sources.names import MISSING, counted
from tltrain.data.tables.rows import Row, read_rows

COLUMNS = ("path", "label", "split", "group")
FORM = "path,label[,split][,group]"


def open_csv(argument: str, spec: Data) -> Source:
    """Open a CSV file. Relative paths are relative to its folder. Raises UserError, with the line, for an inconsistent table."""
    file = Path(argument).expanduser().absolute()
    rows, columns = read_rows(file, COLUMNS[:2], f"data.source is csv:{file}", FORM)
    if not rows:
        raise UserError(f"{file} has no line below the names of its columns; each further line names an image: {FORM}")
    listed = [_listed(file, line, row, "split" in columns) for line, row in rows]
    _check(file, rows, listed)
    return from_files(listed, f"csv:{file}", spec, _notes(rows, columns, listed))


def _listed(file: Path, line: int, row: dict[str, str], has_split: bool) -> Listed:
    empty = [column for column in COLUMNS[:2] if not row[column]]
    if empty:
        raise UserError(f"{file}, line {line}: {some(empty)} is empty; every line needs a path and a label")
    split_name = row["split"] if has_split else "train"
    split = split_of(split_name)
    if split is None:
        raise UserError(f"{file}, line {line}: split is {split_name!r}; it must be train, val or test")
    path, name = _resolve(file.parent, row["path"])
    return Listed(path, name, split, row["label"], row.get("group", ""))


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


def _check(file: Path, rows: list[Row], listed: list[Listed]) -> None:
    """Raise UserError for a path listed twice, a group in two splits, or a class without training images."""
    paths: dict[str, tuple[Listed, int]] = {}
    groups: dict[str, tuple[str, int]] = {}
    for (line, _), sample in zip(rows, listed, strict=True):
        other, first = paths.setdefault(os.path.normpath(sample.path), (sample, line))
        if first != line and _is_same(other.path, sample.path):
            spelt = "" if other.id == sample.id else f" as {other.id}"
            raise UserError(f"{file}, line {line}: {sample.id} stands in line {first} already{spelt}; list each image once")
        split, first = groups.setdefault(sample.group, (sample.split, line))
        if sample.group and split != sample.split:
            raise UserError(
                f"{file}, line {line}: group {sample.group} is in {sample.split}, and in line {first} in {split}; "
                "a group stays in one split"
            )
    absent = sorted({s.label for s in listed} - {s.label for s in listed if s.split == "train"})
    if absent:
        raise UserError(f"{file}: no line of split train for class {some(absent)}; every class needs training images")


def _is_same(path: Path, other: Path) -> bool:
    """Whether two paths with the same normal form are one file. a/../x may differ from x where a is a link."""
    try:
        return path == other or path.samefile(other)
    except OSError:
        return True


def _notes(rows: list[Row], columns: list[str], listed: list[Listed]) -> tuple[str, ...]:
    notes = []
    unused = [column or "one without a name" for column in columns if column not in COLUMNS]
    if unused:
        notes.append(f"columns that are not used: {some(unused)}")
    num_with_slashes = sum(row["path"] != sample.id for (_, row), sample in zip(rows, listed, strict=True))
    if num_with_slashes:
        notes.append(f"{num_with_slashes} of the paths are written with \\ and are read with /")
    for group in sorted({sample.group for sample in listed if sample.group.casefold() in MISSING}):
        num = sum(sample.group == group for sample in listed)
        notes.append(f"{counted(num)} of group {group!r}, which reads like a missing value: they stay together as one group")
    return tuple(notes)


CSV = SourceKind(lambda argument, spec, root: open_csv(argument or "", spec), argument="PATH")
