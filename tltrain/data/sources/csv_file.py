"""The source csv:FILE: a table with the columns path and label, and optionally split and group."""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from tltrain.core.errors import UserError, some
from tltrain.core.files import read_bytes
from tltrain.core.recipe import Data
from tltrain.data.dataset import Source, SourceKind
from tltrain.data.sources.image_list import Listed, from_files
from tltrain.data.sources.layout import split_of
from tltrain.data.sources.names import MISSING, counted

COLUMNS = ("path", "label", "split", "group")


def open_csv(argument: str, spec: Data) -> Source:
    """Open a CSV file. Relative paths are relative to its folder. Raises UserError, with the line, for an inconsistent table."""
    file = Path(argument).expanduser().absolute()
    rows, columns = read_rows(file, COLUMNS[:2])
    if not rows:
        raise UserError(f"{file} has no line below the names of its columns; each further line names an image: path,label[,split][,group]")
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


DELIMITERS = (",", ";", "\t", "|")


_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


Row = tuple[int, dict[str, str]]
"""(line number, value by column)."""


def read_rows(file: Path, needed: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The non-empty rows, and the column names in lower case, all stripped of surrounding spaces.

    Raises UserError, with the line where there is one, for a table that cannot be read, lacks a column of `needed`, names a column
    twice, or has a line with more values than columns.
    """
    text = _text(file)
    delimiter, first = _delimiter(text, needed)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for _ in range(first + 1):
            columns = [name.strip().lower() for name in next(reader, [])]
        _check_columns(file, columns, needed)
        rows = [(reader.line_num, row) for values in reader if any(row := [value.strip() for value in values])]
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}; quotes belong around a whole value, and are doubled in it") from error
    return [(line, _by_column(file, line, row, columns)) for line, row in rows], columns


def _text(file: Path) -> str:
    """The file decoded as UTF-8, or by its byte order mark. Raises UserError, with the line, for anything else."""
    try:
        content = read_bytes(file)
    except OSError as error:
        raise UserError(f"data.source is csv:{file}, which cannot be read as a comma-separated table: {error.strerror or error}") from error
    encoding = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"data.source is csv:{file}, which cannot be read as a comma-separated table in UTF-8: line {line}: {error.reason}; save it as "
            f"UTF-8, or convert it: `iconv -f WINDOWS-1252 -t UTF-8 {file.name}`"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        utf16 = text.count("\0") > len(text) // 3
        remedy = f"it looks like UTF-16: `iconv -f UTF-16LE -t UTF-8 {file.name}`" if utf16 else "remove it"
        raise UserError(f"{file}, line {line}: a NUL byte, which no path and no label can have; {remedy}")
    return text


def _delimiter(text: str, needed: Sequence[str]) -> tuple[str, int]:
    """The delimiter, and the index of the header line. Excel may write a line sep=; above the header."""
    first = io.StringIO(text, newline="").readline().rstrip("\r\n")
    if first.lower().startswith("sep=") and len(first) == 5:
        return first[4], 1
    for delimiter in DELIMITERS:
        if set(needed) <= {name.strip().strip('"').lower() for name in first.split(delimiter)}:
            return delimiter, 0
    return ",", 0


def _check_columns(file: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    missing = [column for column in needed if column not in columns]
    if missing:
        has = f"has the columns {some(columns)} and not {some(missing)}" if columns else "is empty"
        raise UserError(f"{file} {has}; the first line names: path,label[,split][,group]")
    twice = sorted({column for column in columns if column and columns.count(column) > 1})
    if twice:
        raise UserError(f"{file}, line 1: column {some(twice)} stands there more than once; keep one of them")


def _by_column(file: Path, line: int, values: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    """Values by column. Missing values at the end are empty. Raises UserError for too many values: an unquoted comma would cut a label."""
    more = [value for value in values[len(columns) :] if value]
    if more:
        raise UserError(
            f"{file}, line {line}: {len(values)} values for {len(columns)} columns, {some(more)} too many; put a value that holds the "
            'delimiter into quotes ("cat, black")'
        )
    padded = [*values, *[""] * (len(columns) - len(values))]
    return {column: value for column, value in zip(columns, padded, strict=False) if column}
