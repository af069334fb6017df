"""Symbolic links in a run folder. These checks keep a run from writing, renaming or deleting files outside its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

from tltrain.core.errors import UserError

WRITTEN_IN = ("checkpoints", "stages", "generations", "jobs", "wandb", "tensorboard", "mlflow")
"""The subfolders in which a start or the launcher creates files."""


def check_links(run: Path) -> None:
    """Raise UserError if a subfolder is a link out of the run folder. The run folder itself may be a link."""
    inside = run.resolve()
    for name in WRITTEN_IN:
        folder = run / name
        below = folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ()
        for path in (folder, *below):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise UserError(
                    f"{path} is a link to {path.resolve()}, and a start would write and delete there; put a folder in its place, or make "
                    "the whole run folder a link"
                )


def append_only(path: Path) -> TextIO:
    """Open a file for appending and create it if needed. Raises UserError for a link or a pipe, and OSError."""

    def opened(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # opening a pipe must not block

    try:
        return open(path, "a", encoding="utf-8", opener=opened)
    except OSError as error:
        if path.is_symlink() or path.is_fifo():
            raise UserError(f"{path} is a link or a pipe, and lines would be written where it leads; delete it") from error
        raise
