"""Reads a table of a person or a spreadsheet: comma, semicolon, tab or bar between values, UTF-8 or UTF-16."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tltrain.core.errors import UserError, some
from tltrain.core.files import read_bytes

DELIMITERS = (",", ";", "\t", "|")
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

Row = tuple[int, dict[str, str]]
"""(line number, value by column)."""


def read_rows(file: Path, needed: Sequence[str], what: str, form: str) -> tuple[list[Row], list[str]]:
    """The non-empty rows, and the column names in lower case, all stripped of surrounding spaces.

    what: how a message begins, such as `data.source is csv:x.csv`. form: the first line of such a table, such as path,label[,split].
    Raises UserError, with the line where there is one, for a table that cannot be read, lacks a column of `needed`, names a column
    twice, or has a line with more values than columns.
    """
    columns, rows = stream_rows(file, needed, what, form)
    return [(line, {name: value for name, value in zip(columns, values, strict=True) if name}) for line, values in rows], columns


def stream_rows(file: Path, needed: Sequence[str], what: str, form: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """As `read_rows`, for a million rows: the column names, and (line number, a value for each column), one row at a time."""
    content, encoding = _content(file, what)
    lines = io.TextIOWrapper(io.BytesIO(content), encoding, newline="")
    delimiter, first = _delimiter(lines.readline(), needed)
    lines.seek(0)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    columns: list[str] = []
    with _csv_errors(file, reader):
        for _ in range(first + 1):
            columns = [name.strip().lower() for name in next(reader, [])]
    _check_columns(file, columns, needed, form)
    return columns, _rows(file, reader, columns)


def _rows(file: Path, reader: Any, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    num = len(columns)
    with _csv_errors(file, reader):
        for values in reader:
            row = [value.strip() for value in values]
            if any(row):
                yield reader.line_num, row if len(row) == num else _of_length(file, reader.line_num, row, columns)


@contextmanager
def _csv_errors(file: Path, reader: Any) -> Iterator[None]:
    """Turns a mistake in the quotes of a table into a UserError that names the line."""
    """Turns a mistake in the quotes of a table into a UserError that names the line."""
    try:
        yield
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}; quotes belong around a whole value, and are doubled in it") from error


def _content(file: Path, what: str) -> tuple[bytes, str]:
    """The file, and its encoding: UTF-8, or that of its byte order mark. Raises UserError, with the line, for anything else."""
    try:
        content = read_bytes(file)
    except OSError as error:
        raise UserError(f"{what}, which cannot be read as a comma-separated table: {error.strerror or error}") from error
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise UserError(f"{what}, which is an Excel file or another archive; save it as CSV (UTF-8) from there")
    encoding = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{what}, which cannot be read as a comma-separated table in UTF-8: line {line}: {error.reason}; save it as "
            f"UTF-8, or convert it: `iconv -f WINDOWS-1252 -t UTF-8 {file.name}`"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        utf16 = text.count("\0") > len(text) // 3
        remedy = f"it looks like UTF-16: `iconv -f UTF-16LE -t UTF-8 {file.name}`" if utf16 else "remove it"
        raise UserError(f"{file}, line {line}: a NUL byte, which no path and no label can have; {remedy}")
    return content, encoding


def _delimiter(first: str, needed: Sequence[str]) -> tuple[str, int]:
    """The delimiter by the first line, and the index of the header line. Excel may write a line sep=; above the header."""
    first = first.rstrip("\r\n")
    if first.lower().startswith("sep=") and len(first) == 5:
        return first[4], 1
    for delimiter in DELIMITERS:
        if set(needed) <= {name.strip().strip('"').lower() for name in first.split(delimiter)}:
            return delimiter, 0
    return ",", 0


def _check_columns(file: Path, columns: Sequence[str], needed: Sequence[str], form: str) -> None:
    missing = [column for column in needed if column not in columns]
    if missing:
        has = f"has the columns {some(columns)} and not {some(missing)}" if columns else "is empty"
        raise UserError(f"{file} {has}; the first line names: {form}")
    twice = sorted({column for column in columns if column and columns.count(column) > 1})
    if twice:
        raise UserError(f"{file}, line 1: column {some(twice)} stands there more than once; keep one of them")


def _of_length(file: Path, line: int, values: Sequence[str], columns: Sequence[str]) -> list[str]:
    """As many values as columns; missing ones at the end are empty. Raises UserError for too many: an unquoted comma would cut a label."""
    more = [value for value in values[len(columns) :] if value]
    if more:
        raise UserError(
            f"{file}, line {line}: {len(values)} values for {len(columns)} columns, {some(more)} too many; put a value that holds the "
            'delimiter into quotes ("cat, black")'
        )
    return [*values[: len(columns)], *[""] * (len(columns) - len(values))]
