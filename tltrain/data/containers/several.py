"""A data set of several containers: the files that a pattern matches, and the split of each."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tltrain.core.errors import UserError, some
from tltrain.core.output.progress import Pace
from tltrain.core.paths import absolute
from tltrain.core.schema.data import is_url
from tltrain.data.remote.copies import copied, listed
from tltrain.data.sources.layout import SPLITS
from tltrain.data.sources.names import check_utf8

T = TypeVar("T")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def files_of(argument: str | None, source: str, suffixes: Sequence[str]) -> list[Path]:
    """The files that GLOB means, sorted: a file, a pattern with * or with {000..146}, or a folder with all of its files of these suffixes.

    Of URLs these are the local copies.
    Raises UserError where there is none, and where a file of a range is missing.
    """
    pattern = str(absolute(argument or ""))
    whole = f"data.source is {source}:{argument or ''}"
    found: list[Path] = []
    if argument and is_url(argument):
        found = [copied(url) for url in with_progress([url for part in _ranged(argument) for url in listed(part, suffixes)])]
    elif argument and os.path.isdir(pattern):
        found = [path for suffix in suffixes for path in Path(pattern).rglob(f"*{suffix}") if not path.name.startswith(".")]
    elif argument:
        parts = _ranged(pattern)
        by_part = {part: [part] if os.path.isfile(part) else glob.glob(part, recursive=True) for part in parts}
        found = [Path(name) for names in by_part.values() for name in names]
        missing = [part for part, names in by_part.items() if len(parts) > 1 and not names]
        if missing:
            raise UserError(f"{whole}; {len(missing):,} of its {len(parts):,} files cannot be found: {some(missing)}")
    files = {path for path in found if path.is_file()}
    _check_left_out([path for path in found if path not in files and path.name.endswith(tuple(suffixes))], files, whole)
    if not files:
        form = f"a file, a folder, or a pattern such as {source}:'data/train-*{suffixes[0]}'"
        raise UserError(f"{whole}, and no file is there; give {form}")
    for path in files:
        check_utf8(path)
    return sorted(files)


def _check_left_out(others: Sequence[Path], files: Collection[Path], whole: str) -> None:
    """Raise UserError for what is called as a container and is no file: without it a part of the data would be missing.

    That is a link to nothing, as in a cache of downloads whose files were deleted, or a folder, as Spark writes, without one of `files`.
    """
    if no_files := sorted({str(path) for path in others if not path.is_dir()}):
        raise UserError(f"{whole}; links to nothing in place of files: {some(no_files)}; fetch the files again, or delete the links")
    if folders := sorted({str(path) for path in others if path.is_dir() and not any(path in file.parents for file in files)}):
        raise UserError(f"{whole}; folders in place of files: {some(folders)}; give one folder, or a pattern of the files in them")


def _ranged(pattern: str) -> list[str]:
    """x-{008..010} as x-008, x-009, x-010. What holds no range is itself."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [name for n in numbers for name in _ranged(pattern[: match.start()] + n + pattern[match.end() :])]


def names_of(files: Sequence[Path]) -> list[str]:
    """The name of each file in image ids: its path below the folder that all files share."""
    shared = Path(os.path.commonpath([file.parent for file in files]))
    return [file.relative_to(shared).as_posix() for file in files]


def splits_of(names: Sequence[str], whole: str) -> tuple[list[str], tuple[str, ...]]:
    """(the split of each file by the words in its name, a note). All of them are train where no name says one.

    Raises UserError where some names say a split and others none, or none of them train. whole: the source, in messages.
    """
    said = [_split_in(name) for name in names]
    if not any(said):
        return ["train"] * len(names), ()
    if not all(said):
        unknown = [name for name, split in zip(names, said, strict=True) if not split]
        raise UserError(f"{whole}: some files are called like a split, and these are not: {some(unknown)}; call them train, val or test, "
                        "or leave them out of the pattern")  # fmt: skip
    counts = Counter(said)
    if "train" not in counts:
        raise UserError(f"{whole}: no file is called train, only {some(sorted(counts))}; give the training images too")
    listed = ", ".join(f"{counts[name]} {name}" for name in ("train", "val", "test") if counts[name])
    return said, (f"splits by the names of the files: {listed}",)


def with_progress(files: Sequence[T]) -> Iterator[T]:
    """Iterates over the files, and reports how many are done."""
    pace = Pace("files looked through", len(files))
    for file in files:
        yield file
        pace.advance()


def _split_in(name: str) -> str:
    """The split that the words of a file's name say, else those of its folders. Empty: none, or two different ones."""
    for part in reversed(name.split("/")):
        words = {SPLITS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLITS}
        if words:
            return words.pop() if len(words) == 1 else ""
    return ""
