"""The source parquet:GLOB: tables with a column of image files and a column of classes.

An image of a Parquet file cannot be read by itself, since rows are compressed together. So the images of each file are laid out once, end
to end, in a file of the cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tltrain.core.errors import UserError, first_line, some
from tltrain.core.files import remedy, replacing
from tltrain.core.output import progress
from tltrain.core.paths import cache_root
from tltrain.core.recipe import Data
from tltrain.data.containers.columns import NEEDED, Columns, classes_of, find_columns
from tltrain.data.containers.contents import Contents, Extent, cached_contents, stamp_of
from tltrain.data.containers.packed import from_packed, numbers_first, of_contents
from tltrain.data.containers.several import files_of, names_of, splits_of, with_progress
from tltrain.data.dataset import Source, SourceKind
from tltrain.data.sources.layout import split_of

ROWS = 64
"""Rows that are read at a time: images of 10 MB each then take 640 MB."""


def open_parquet(argument: str | None, spec: Data) -> Source:
    """Open Parquet files. Raises UserError for a damaged file, for missing columns, and for a row without a class."""
    arrow()
    files = files_of(argument, "parquet", (".parquet", ".pq"))
    origin = f"parquet:{argument}"
    names = names_of(files)
    splits, notes = splits_of(names, f"data.source is {origin}")
    what = f"parquet|{spec.image_column}|{spec.label_column}"
    tables = [cached_contents(file, what, lambda file: _look_through(file, spec, _place(file, what))) for file in with_progress(files)]
    images = [
        image
        for file, name, split, table in zip(files, names, splits, tables, strict=True)
        for image in of_contents(table, name, file, split)
    ]
    if copied := sum(table.file.stat().st_size for table in tables):
        notes += (f"the images are laid out once in {cache_root() / 'packs'}, {copied / 1e6:,.1f} MB: Parquet gives no single image",)
    order = tables[0].classes or numbers_first([image.listed.label for image in images])
    return from_packed(images, origin, spec, (*notes, *class_notes(tables)), order)


def class_notes(tables: Sequence[Contents]) -> tuple[str, ...]:
    """Notes on rows without a class, and on classes that the tables name and no row has. Raises UserError where tables name others."""
    named = {table.classes for table in tables}
    if len(named) > 1:
        raise UserError(f"the tables name different classes: {' and '.join(f'({some(names)})' for names in sorted(named))}; they are one "
                        "data set only where a number means the same class")  # fmt: skip
    notes = sorted({note for table in tables for note in table.notes})
    there = {extent.label for table in tables for extent in table.images}
    nowhere = [name for name in tables[0].classes if name not in there]
    return (*notes, *((f"classes that no image has are left out: {some(nowhere)}",) if nowhere else ()))


def arrow() -> Any:
    """pyarrow with its part for Parquet. Raises UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"tables of Parquet and Arrow are read by pyarrow, which is not here ({error}): {NEEDED}") from error
    return pyarrow


def entries(values: Sequence[dict[str, Any]], columns: Columns, place: str, first: int) -> Iterator[tuple[int, Extent]]:
    """(row, what the table says of its image, whose bytes are not placed yet) of each row that has a class."""
    labels = classes_of([value[columns.label] for value in values], columns, place, first)
    for row, (value, label) in enumerate(zip(values, labels, strict=True), first):
        if label is None:
            continue
        split = ""
        if columns.split:
            split = split_of(str(value[columns.split])) or ""
            if not split:
                raise UserError(f"{place}, row {row}: {columns.split} is {value[columns.split]!r}; it must be train, val or test")
        group = value[columns.group] if columns.group else None
        yield row, Extent(str(row), -1, 0, label, split, "" if group is None else str(group))


def untold(num: int, place: str) -> tuple[str, ...]:
    """A note on rows without a known class (-1)."""
    return (f"{place}: {num:,} images whose class is -1, not told, are left out",) if num else ()


def _place(file: Path, what: str) -> Path:
    """The pack of a table as it is now. One that has changed gets another: who reads the old one goes on with it."""
    name, state = (hashlib.blake2b(os.fsencode(text), digest_size=8).hexdigest() for text in (f"{file}|{what}", str(stamp_of(file))))
    return cache_root() / "packs" / f"{name}-{state}.bin"


def _look_through(file: Path, spec: Data, pack: Path) -> Contents:
    pa = arrow()
    pack.parent.mkdir(exist_ok=True)
    for left in pack.parent.glob(f".{pack.name.partition('-')[0]}-*.tmp"):  # by a process that was killed: one at a time looks
        left.unlink(missing_ok=True)
    try:
        with pa.parquet.ParquetFile(file) as table, replacing(pack) as temporary, temporary.open("wb") as out:
            columns = find_columns(table.schema_arrow, spec, str(file))
            return _lay_out(table, columns, file, pack, out)
    except OSError as error:
        if error.errno is None:  # pyarrow's own, of a damaged file
            raise UserError(f"{file} is not a whole Parquet file: {first_line(error).rstrip('.')}; copy or download it again") from error
        raise UserError(f"the images of {file} cannot be laid out in {pack.parent}: {error.strerror}. {remedy(error)}") from error
    except pa.ArrowException as error:
        raise UserError(f"{file} is not a whole Parquet file: {first_line(error).rstrip('.')}; copy or download it again") from error


def _lay_out(table: Any, columns: Columns, file: Path, pack: Path, out: BinaryIO) -> Contents:
    """Write the images end to end."""
    images: list[Extent] = []
    first = 0
    for batch in table.iter_batches(batch_size=ROWS, columns=columns.names()):
        values = batch.to_pylist()
        for row, said in entries(values, columns, str(file), first):
            content, path = _content(values[row - first][columns.image], file, row)
            images.append(said._replace(start=out.tell(), length=len(content), path=path))
            out.write(content)
        first += len(values)
        progress.report(f"{file.name}: {first:,} rows laid out")
    return Contents(pack, tuple(images), untold(first - len(images), file.name), columns.classes)


def _content(value: Any, file: Path, row: int) -> tuple[bytes, str]:
    """(the bytes of an image, the file that the row names in their place). Nothing is empty, which the scan calls unreadable."""
    if not isinstance(value, dict):
        return value or b"", ""
    if value.get("bytes") is None and value.get("path"):
        path = file.parent / value["path"]
        if not path.is_file():
            raise UserError(f"{file}, row {row}: the image lies in {value['path']}, which is not there; write the bytes into the table")
        return b"", str(path)
    return value.get("bytes") or b"", ""


PARQUET = SourceKind(lambda argument, spec, root: open_parquet(argument, spec), argument="GLOB", columns=True)
