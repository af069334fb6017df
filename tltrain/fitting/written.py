"""A chosen recipe as YAML, with the reason of each line above it."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.fitting.choose import Draft

_WIDTH = 110
_SPACES = dict.fromkeys(map(ord, "\u00a0\u202f"), " ")


def text(draft: Draft, head: list[str]) -> str:
    """The file. head: lines of comment above everything."""
    top = "".join(f"{line}\n" for line in _comment("", " ".join(head)))
    return top + "\n".join(_lines(draft.values, "", "", draft.reasons)) + "\n"


def check_unedited(file: Path, kept: Collection[str]) -> None:
    """Check that a recipe is as it was written, if it is there: writing it anew would lose what a person changed. Raises UserError.

    kept: the texts that were written.
    """
    if file.is_file() and file.read_text(encoding="utf-8", errors="replace") not in kept:
        raise UserError(
            f"{file} is not as it was written, and this command trains what it chose itself; train yours with "
            f"`tltrain train {file} --folder ANOTHER`, or delete the file, so that it is written again"
        )


def _lines(values: dict[str, Any], path: str, indent: str, reasons: dict[str, str]) -> Iterator[str]:
    for key, value in values.items():
        where = f"{path}{key}"
        if where in reasons:
            yield from _comment(indent, reasons[where])
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _lines(value, f"{where}.", f"{indent}  ", reasons)
        elif isinstance(value, list) and isinstance(value[0], dict):
            yield f"{indent}{key}:"
            for number, item in enumerate(value):
                yield from _item(list(_lines(item, f"{where}.{number}.", f"{indent}    ", reasons)), indent)
        else:
            yield f"{indent}{key}: {_scalar(value)}"


def _item(lines: list[str], indent: str) -> Iterator[str]:
    """The lines of one item of a list. The dash stands before its first key, below that key's comment."""
    first = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
    lines[first] = f"{indent}  - {lines[first].lstrip()}"
    yield from lines


def _comment(indent: str, reason: str) -> list[str]:
    plain = escape.line(reason.translate(_SPACES))
    return textwrap.wrap(plain, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, width=10_000, allow_unicode=True, default_flow_style=True).removesuffix("\n...\n").strip()
