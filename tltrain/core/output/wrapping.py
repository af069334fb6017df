"""Lines that are longer than a terminal, broken at spaces. Paths and commands stay whole, so that they can be copied.

In a pipe, a file or a log nothing is broken: there a line is a line, for grep and for programs.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import IO

from tltrain.core.output import escape

_PIECE = re.compile(
    r"(\s*)((?:`[^`]*`|(?<!\w)'[^']*'(?!\w)|\"[^\"]*\"|--[A-Za-z][\w.-]* (?=[^\s-])"
    r"|(?<![\w.,])\d[\d.,]*(?: min \d+ s| h \d+ min| (?:%|[KMGT]?B|ms|s|min|h|px|img/s|points?))(?![\w/])|\S)+)"
)
"""Space, and what is never broken: words, and what stands in backticks or quotation marks. A flag goes with its value, a number with
its unit."""
_PART = re.compile(r"[^/_=:.\s-]*(?:[/_=:.-]|\s+)|[^/_=:.\s-]+")
_COMMAND = re.compile(r"\s+(?:tltrain|python|accelerate|sbatch|scancel|wandb|pip|apt) |\s*(?:page|table|report|folder|export|absent) {2,}")
"""Lines that are one command, or end with one, or with one path: no part of them is broken."""
_SEVEN = "weights|classes|teacher|student|against|network|abstain|answers"
"""Labels that are parted from their text by one space, since a label with its space has eight columns."""
_BEFORE = re.compile(rf"\s*(?:tltrain: |(?:ok|note|BAD) {{2,}}\S+(?: \d+)? {{2,}}|[\w&-]+ {{2,}}|(?:{_SEVEN}) (?! ))?")
"""What a line begins with: the next ones stand below what is behind it."""
_MOST_BEFORE, _LEAST_TEXT = 24, 30
"""Columns: a beginning that is wider, or that leaves less for the text, is no column of its own."""


def fitted(text: str, width: int) -> str:
    """The text with no line wider than `width` columns, except for what must stay whole. Lines that fit stay as they are."""
    from rich.cells import cell_len

    return "\n".join(line if cell_len(line) <= width else _broken(line, width) for line in text.split("\n"))


def _broken(line: str, width: int) -> str:
    from rich.cells import cell_len

    if _COMMAND.match(line):
        return line
    begin = _BEFORE.match(line)
    before = begin[0] if begin is not None else ""
    indent = len(before) if len(before) <= min(_MOST_BEFORE, width - _LEAST_TEXT) else 2
    indent += 2 if before.isspace() and indent <= 4 else 0  # an entry of a list, and no column
    rows, row = [], before
    for space, word in _PIECE.findall(line, len(before)):
        if row != before and cell_len(row + space + word) > width:
            rows.append(row)
            row = " " * indent + word
        else:
            row += space + word
    return "\n".join([*rows, row])


def name_parts(name: str) -> list[str]:
    """A name of a file or a network, cut behind the signs and spaces where a narrow column may break it."""
    return _PART.findall(name)


def fitted_name(name: str, width: int) -> list[str]:
    """The rows of a name in a column of `width`. Only a part that is wider is a row that does not fit."""
    from rich.cells import cell_len

    rows = [""]
    for part in name_parts(name):
        if rows[-1] and cell_len((rows[-1] + part).rstrip()) > width:
            rows.append("")
        rows[-1] += part
    return [row.rstrip() for row in rows]


def width_of(stream: IO[str]) -> int | None:
    """Columns of the terminal that a stream writes to. None: it is no terminal."""
    try:
        if not stream.isatty():
            return None
        asked = os.environ.get("COLUMNS", "")
        return int(asked) if asked.isdigit() and int(asked) > 0 else os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return None


def say(text: str, stream: IO[str] | None = None) -> None:
    """Print text in whole lines, broken where the stream is a terminal. stream: standard output, unless another is given. Control
    characters are the caller's to escape, as everywhere."""
    stream = sys.stdout if stream is None else stream
    width = width_of(stream)
    print(text if width is None else fitted(text, width), file=stream, flush=True)


def note(text: str) -> None:
    """Print a note to standard error: what was decided, or what is to be known."""
    say(f"note    {escape.line(text)}", sys.stderr)


class Notes(logging.Handler):
    """Says what is logged as notes are said."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            note(record.getMessage())
        except Exception:  # as the handlers of logging do: what cannot be said ends nothing
            self.handleError(record)


def say_warnings() -> None:
    """From now on the warnings of this package are notes, where they would be bare lines. More than once is as once."""
    logger = logging.getLogger("tltrain")
    if not any(isinstance(handler, Notes) for handler in logger.handlers):
        logger.addHandler(Notes(logging.WARNING))
