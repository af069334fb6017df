"""Quoting for bash: quoted text arrives unchanged and is never executed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from tltrain.core.errors import UserError


def quote(word: str) -> str:
    """Quote one word for a bash script.

    Control characters are written as escapes. So each statement stays on one line, and sbatch finds no DOS line ends, which it rejects.
    Raises UserError for a zero byte, which no command argument can hold.
    """
    if "\0" in word:
        raise UserError(f"{word!r} holds a zero byte, which no command can be given; remove it")
    if all(c.isprintable() or c == "\u200d" for c in word):
        return shlex.quote(word)
    return "$'" + "".join(_escape(c) for c in word) + "'"


def join(words: Sequence[str]) -> str:
    """Quote words and join them with spaces, for one line of a bash script."""
    return " ".join(quote(word) for word in words)


def array(name: str, words: Sequence[str]) -> str:
    """Assignment of a bash array: NAME=(…)."""
    return f"{name}=({join(words)})"


def _escape(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if ord(character) < 0x20 or ord(character) == 0x7F:
        return f"\\{ord(character):03o}"  # always three octal digits, so that a digit that follows is not read as part of the escape
    return character
