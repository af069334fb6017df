"""Checks of class and file names: valid UTF-8, near-duplicates, placeholders for missing values."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tltrain.core.errors import UserError, some
from tltrain.data.dataset import class_counts

MISSING = {"nan", "none", "null", "na", "n/a", "<na>", "nat"}
"""Placeholders for a missing value in tables, in lower case."""

UNICODE = "how an accent is written (NFC and NFD of Unicode)"


def check_utf8(path: Path) -> None:
    """Raise UserError for a path that is not UTF-8, or not read as UTF-8. It could not be written to predictions, JSON or reports."""
    name = os.fsencode(path)
    try:
        if name.decode() != str(path):
            raise UserError(
                f"{shown(path)}: this Python reads file names as {sys.getfilesystemencoding()}, which changes this one; set PYTHONUTF8=1, "
                "or a locale such as LC_ALL=C.UTF-8"
            )
    except UnicodeDecodeError:
        raise UserError(
            f"{shown(path)}: the name is not UTF-8 and cannot be written to results; rename it, all of a folder at once by "
            "`convmv -r --notest -f latin1 -t utf8 FOLDER`"
        ) from None


def check_all_utf8(folder: Path, names: Sequence[str]) -> None:
    """As `check_utf8` for the files of a folder, many at a time."""
    if sys.getfilesystemencoding() == "utf-8":
        try:
            "".join(names).encode()
            return
        except UnicodeEncodeError:  # bytes that are not UTF-8 are surrogates in a name
            pass
    for name in names:
        check_utf8(folder / name)


def shown(path: Path | str) -> str:
    r"""A printable path: bytes that are not UTF-8 are escaped, such as \xe9."""
    return os.fsencode(path).decode(errors="backslashreplace")


def counted(num: int, what: str = "image") -> str:
    """A number with its noun: 1 image, 1,200 images."""
    return f"{num:,} {what}{'s' * (num != 1)}"


def count_classes(classes: Sequence[str], label_N: np.ndarray) -> str:
    """Each class with its number of samples, shortened: cat 120, dog 80. label_N: as in `Split`."""
    count_K = class_counts(label_N, len(classes)).tolist()
    return some([f"{name} {n:,}" for name, n in zip(classes, count_K, strict=True)])


def doubtful(classes: Sequence[str], label_N: np.ndarray) -> tuple[str, ...]:
    """Notes on classes whose names are nearly equal, and on names that look like a missing value."""
    count_K = class_counts(label_N, len(classes)).tolist()
    counts = dict(zip(classes, count_K, strict=True))
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[_plain(name)].append(name)
    notes = []
    for names in alike.values():
        if len(names) > 1:
            what = _difference(names)
            quote = ascii if what is UNICODE else repr
            listed = " and ".join(f"{quote(name)} ({counted(counts[name])})" for name in names)
            notes.append(f"classes whose names differ only in {what}: {listed}; if they are one, give them one name")
    missing = [f"{name!r} ({counted(counts[name])})" for name in classes if name.casefold() in MISSING]
    if missing:
        notes.append(f"classes that are called like a missing value: {some(missing)}")
    return tuple(notes)


def joined(classes: Sequence[str]) -> str:
    """A note where classes read as sets of others, such as cat|dog. Empty: none do, or fewer than two whose parts are classes or recur."""
    known = set(classes)
    for mark in "|;,":
        parts_of = {name: [part.strip() for part in name.split(mark)] for name in classes if mark in name}
        times = Counter([part for parts in parts_of.values() for part in set(parts)])
        sets = [name for name, parts in parts_of.items() if all(part in known or times[part] > 1 for part in parts)]
        if len(sets) > 1 and 2 * len(sets) >= len(parts_of):
            named = some([repr(name) for name in sets])
            return (
                f"{len(parts_of)} classes have a {mark!r} in them, and the same names around it ({named}): each is learned as a class of "
                f"its own; if an image has several labels, say so: --label-separator '{mark}' of tltrain fit, probe and doctor, "
                f"--data.label_separator '{mark}' of a recipe"
            )
    return ""


def _plain(name: str) -> str:
    """The name normalised: without case, kind of space, leading zeros and Unicode form."""
    words = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).replace("_", " ").replace("-", " ").split()
    return " ".join(_number(word) for word in words)


def _number(word: str) -> str:
    """A number without leading zeros and zero decimals: 01, 1 and 1.0 become 1. Other words are unchanged."""
    whole, point, rest = word.partition(".")
    if not (whole.isdecimal() and whole.isascii()) or (point and rest.strip("0")):
        return word
    return whole.lstrip("0") or "0"


def _difference(names: Sequence[str]) -> str:
    """A description of the difference between names with one normal form."""
    if len({unicodedata.normalize("NFC", name) for name in names}) == 1:
        return UNICODE
    if len({name.casefold() for name in names}) == 1:
        return "upper and lower case"
    return "how a number is written" if _plain(names[0]).isdecimal() else "case, spaces, signs or leading zeros"
