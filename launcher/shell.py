"""Quoting for bash: quoted text arrives unchanged and is never executed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from tltrain.core.errors import UserError


def quote(word: str) -> str:
    """One word of a bash script. Control characters are written as escapes, so that a script has one statement a line and sbatch,
    which refuses DOS line ends, takes it. Raises UserError for a zero byte, which no argument can hold."""
    if "\0" in word:
        raise UserError(f"{word!r} holds a zero byte, which no command can be given; remove it")
    if all(c.isprintable() or c == "\u200d" for c in word):
        return shlex.quote(word)
    return "$'" + "".join(_escape(c) for c in word) + "'"


def join(words: Sequence[str]) -> str:
    """Words on one line of a bash script."""
    return " ".join(quote(word) for word in words)


def array(name: str, words: Sequence[str]) -> str:
    """A bash array."""
    return f"{name}=({join(words)})"


def _escape(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if ord(character) < 0x20 or ord(character) == 0x7F:
        return f"\\{ord(character):03o}"  # three digits, so that a digit after it stays itself
    return character
