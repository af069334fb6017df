"""Folders on this machine: downloaded data sets, and the cache."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tltrain.core.errors import UserError


def data_root() -> Path:
    """The folder of downloaded data sets: TLTRAIN_DATA, else data/ in the user's cache folder, else in TLTRAIN_CACHE. Raises UserError."""
    configured = os.environ.get("TLTRAIN_DATA")
    return absolute(configured or (_user_cache() or cache_root()) / "data")


def cache_root() -> Path:
    """The cache folder: TLTRAIN_CACHE, else the user's cache folder. Created if absent. Raises UserError."""
    root = os.environ.get("TLTRAIN_CACHE") or _user_cache()
    if root is None:
        remedy = "set TLTRAIN_CACHE (or HOME) to a folder that can be written to"
        raise UserError(f"user {os.getuid()} has no home folder, so there is no place for a cache; {remedy}")
    return writable(absolute(root), "TLTRAIN_CACHE")


def writable(folder: Path, variable: str) -> Path:
    """The folder, created if absent. Raises UserError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created: {error.strerror}; set {variable} to a folder that can be written to") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to; set {variable} to a folder that can")
    return folder


def absolute(path: str | Path) -> Path:
    """The absolute path, with ~ expanded. Raises UserError where the home folder is unknown."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"{path} cannot be resolved: no home folder is known for its ~; write the whole path") from error


def _user_cache() -> Path | None:
    """None for a user without a home folder, such as an unknown user id in a container."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "tltrain"
    with suppress(RuntimeError):
        return Path.home() / ".cache" / "tltrain"
    return None
