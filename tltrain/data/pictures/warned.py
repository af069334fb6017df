"""Pillow's warnings, by the file that they are about: Pillow itself does not name it."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_thread = threading.local()


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, str]]:
    """Inside, warnings that arise in `about` are not printed: the dictionary holds the last one of each file, as one line."""
    said: dict[str, str] = {}
    with warnings.catch_warnings():
        show = warnings.showwarning

        def record(message: Warning | str, *rest: Any, **named: Any) -> None:
            file = getattr(_thread, "file", None)
            if file is None:
                show(message, *rest, **named)
            else:
                said[file] = (str(message).strip().splitlines() or [type(message).__name__])[0]

        warnings.filterwarnings("always", module=r"(PIL|tltrain\.data)\.")
        warnings.showwarning = record
        yield said


@contextlib.contextmanager
def about(file: str) -> Iterator[None]:
    """Inside, this thread decodes that file."""
    _thread.file = file
    try:
        yield
    finally:
        _thread.file = None
