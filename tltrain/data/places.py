"""Where downloads and what can be made again lie on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from tltrain.errors import UserError


def data_root() -> Path:
    """Downloaded data sets: TLTRAIN_DATA, else the user's cache folder."""
    return Path(os.environ.get("TLTRAIN_DATA") or _user_cache() / "data").expanduser().absolute()


def cache_root() -> Path:
    """What can be made again: TLTRAIN_CACHE, else the user's cache folder. Made if absent. Raises UserError."""
    root = Path(os.environ.get("TLTRAIN_CACHE") or _user_cache()).expanduser().absolute()
    return writable(root, "TLTRAIN_CACHE")


def writable(folder: Path, variable: str) -> Path:
    """The folder, made if absent. Raises UserError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; set {variable} to a folder that can be written to") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to; set {variable} to a folder that can")
    return folder


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tltrain"
