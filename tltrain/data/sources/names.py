"""Names of classes and files: what can be written everywhere, and which classes may be one and the same."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tltrain.core.errors import UserError, some

MISSING = {"nan", "none", "null", "na", "n/a", "<na>", "nat"}
"""What tables write where they have no value."""

UNICODE = "how an accent is written (NFC and NFD of Unicode)"


def check_utf8(path: Path) -> None:
    """Raise UserError for a path that is not UTF-8: it could not be written to the predictions, to JSON or to a page."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{shown(path)}: the name is not UTF-8, so that no result could name it; rename it, all of a folder at once by "
            "`convmv -r --notest -f latin1 -t utf8 FOLDER`"
        ) from None


def shown(path: Path | str) -> str:
    r"""A path that can be printed: bytes that are not UTF-8 are written out, as \xe9."""
    return os.fsencode(path).decode(errors="backslashreplace")


def counted(num: int, what: str = "image") -> str:
    """1 image, 1,200 images."""
    return f"{num:,} {what}{'s' * (num != 1)}"


def count_classes(classes: Sequence[str], label_N: np.ndarray) -> str:
    """cat 120, dog 80: each class with its number of samples, cut after a while."""
    count_K = np.bincount(label_N, minlength=len(classes)).tolist()
    return some([f"{name} {n:,}" for name, n in zip(classes, count_K, strict=True)])


def doubtful(classes: Sequence[str], label_N: np.ndarray) -> tuple[str, ...]:
    """Notes on classes whose names differ so little that they may be one, and on names that stand for a missing value."""
    count_K = np.bincount(label_N, minlength=len(classes)).tolist()
    counts = dict(zip(classes, count_K, strict=True))
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[_plain(name)].append(name)
    notes = []
    for names in alike.values():
        if len(names) > 1:
            what = _difference(names)
            written = ascii if what is UNICODE else repr
            listed = " and ".join(f"{written(name)} ({counted(counts[name])})" for name in names)
            notes.append(f"classes whose names differ only in {what}: {listed}; if they are one, give them one name")
    missing = [f"{name!r} ({counted(counts[name])})" for name in classes if name.casefold() in MISSING]
    if missing:
        notes.append(f"classes that are called like a missing value: {some(missing)}")
    return tuple(notes)


def _plain(name: str) -> str:
    """The name without case, kind of space, leading zeros and ways of writing an accent."""
    words = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).replace("_", " ").replace("-", " ").split()
    return " ".join(_number(word) for word in words)


def _number(word: str) -> str:
    """01, 1 and 1.0 are one number."""
    whole, point, rest = word.partition(".")
    if not (whole.isdecimal() and whole.isascii()) or (point and rest.strip("0")):
        return word
    return whole.lstrip("0") or "0"


def _difference(names: Sequence[str]) -> str:
    """In what the names differ, in words."""
    if len({unicodedata.normalize("NFC", name) for name in names}) == 1:
        return UNICODE
    if len({name.casefold() for name in names}) == 1:
        return "upper and lower case"
    return "how a number is written" if _plain(names[0]).isdecimal() else "case, spaces, signs or leading zeros"
