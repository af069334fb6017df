"""A line of a notebook's cell that changes in place. It needs no widgets, and what is saved with the notebook is plain text."""

from __future__ import annotations

import html
import sys
import time
from typing import Any

UPDATE_S = 0.5
"""Least time between two changes of the line, seconds: each is a message to the browser, which keeps the last one."""
_STYLE = "font-family:monospace;font-size:90%;white-space:pre-wrap"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. Imports nothing: without IPython there is none."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


class Line:
    """The line. It appears below what is printed at its first text, and is empty in the end."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.changed_at = 0.0

    def show(self, text: str, share: float | None = None) -> None:
        """share: of a bar that is full, from 0 to 1. None: no bar. Calls that follow too soon do nothing."""
        now = time.monotonic()
        if self.handle is not None and now - self.changed_at < UPDATE_S:
            return
        self.changed_at = now
        bar = "" if share is None else f'<progress value="{share:.3f}" max="1" style="vertical-align:middle"></progress> '
        self._put({"text/plain": text, "text/html": f'<div style="{_STYLE}">{bar}{html.escape(text)}</div>'})

    def clear(self) -> None:
        if self.handle is not None:
            self._put({"text/plain": "", "text/html": ""})
            self.handle = None

    def _put(self, content: dict[str, str]) -> None:
        from IPython.display import display

        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)
