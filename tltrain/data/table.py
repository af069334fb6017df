"""csv:FILE: a table with the columns path and label, and if wanted split and group."""

from __future__ import annotations

import csv
from pathlib import Path

from tltrain.data.folder import SPLITS
from tltrain.data.images import Source, SourceKind
from tltrain.data.listing import Listed, from_files
from tltrain.data.scan import some
from tltrain.errors import UserError
from tltrain.recipe import Data

COLUMNS = ("path", "label", "split", "group")

Row = tuple[int, dict[str, str]]


def open_csv(argument: str, spec: Data) -> Source:
    """Relative paths count from the table's folder. Raises UserError for a table that contradicts itself, with the line."""
    file = Path(argument).expanduser().absolute()
    rows, columns = _rows(file)
    missing = [column for column in COLUMNS[:2] if column not in columns]
    if missing:
        raise UserError(f"{file} has the columns {some(columns)} and not {some(missing)}; the first line names: path,label[,split][,group]")
    listed = [_listed(file, line, row, "split" in columns) for line, row in rows]
    _check(file, rows, listed)
    unused = [column for column in columns if column not in COLUMNS]
    notes = (f"columns that are not used: {some(unused)}",) if unused else ()
    return from_files(listed, f"csv:{file}", spec.max_unreadable, notes)


def _rows(file: Path) -> tuple[list[Row], list[str]]:
    """(line number, row) for each line with something on it, and the columns."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, restkey="", restval="", strict=True)
            rows = [(reader.line_num, {k: v.strip() for k, v in row.items() if k}) for row in reader]
            return rows, [name.strip() for name in reader.fieldnames or []]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.source is csv:{file}, which cannot be read as a comma-separated table in UTF-8: {error}") from error


def _listed(file: Path, line: int, row: dict[str, str], has_split: bool) -> Listed:
    empty = [column for column in COLUMNS[:2] if not row[column]]
    if empty:
        raise UserError(f"{file}, line {line}: {some(empty)} is empty; every line needs a path and a label")
    split = row["split"] if has_split else "train"
    if split not in SPLITS:
        raise UserError(f"{file}, line {line}: split is {split!r}; it must be train, val or test")
    return Listed(file.parent / Path(row["path"]).expanduser(), row["path"], SPLITS[split], row["label"], row.get("group", ""))


def _check(file: Path, rows: list[Row], listed: list[Listed]) -> None:
    """No path twice, no group in two splits, no class without training images."""
    paths: dict[Path, int] = {}
    groups: dict[str, tuple[str, int]] = {}
    for (line, _), sample in zip(rows, listed, strict=True):
        first = paths.setdefault(sample.path, line)
        if first != line:
            raise UserError(f"{file}, line {line}: {sample.id} stands in line {first} already; list each image once")
        split, first = groups.setdefault(sample.group, (sample.split, line))
        if sample.group and split != sample.split:
            raise UserError(
                f"{file}, line {line}: group {sample.group} is in {sample.split}, and in line {first} in {split}; "
                "a group stays in one split"
            )
    absent = sorted({s.label for s in listed} - {s.label for s in listed if s.split == "train"})
    if absent:
        raise UserError(f"{file}: no line of split train for class {some(absent)}; every class needs training images")


CSV = SourceKind(lambda argument, spec, root: open_csv(argument or "", spec), argument="PATH")
