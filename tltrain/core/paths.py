"""Folders on this machine: downloaded data sets, and the cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from tltrain.core.errors import UserError

FOLDS = "folds.json"
"""The file that a folder of folds has."""


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


def near(path: str | Path) -> str:
    """`; did you mean photos?`, where a path that is not there has a name like one beside it. Else an empty string."""
    missing = Path(path)
    with suppress(OSError, ValueError):
        beside = [each.name for each in missing.parent.iterdir() if not each.name.startswith(".")]
        if found := get_close_matches(missing.name, beside, n=1):
            return f"; did you mean {missing.with_name(found[0])}?"
    return ""


def check_run(run: Path) -> None:
    """Raise UserError where a path is no run folder, with those that may have been meant. Quick: before anything large is imported."""
    if (inner := run_of_a_fit(run)) is not None:
        raise UserError(f"{run} is the folder of a fit, and its run is {inner}; give that")
    if (run / "recipe.yaml").is_file():
        return
    inside = _runs_in(run)
    if inside:
        raise UserError(f"{run} is no run folder, but holds some; give one of them: {', '.join(map(str, inside[:5]))}")
    if run.exists():
        raise UserError(f"{run} is no run folder: it has no recipe.yaml; give the folder that `tltrain train` made")
    others = dict.fromkeys([*_runs_in(run.parent), *_runs_in(Path("runs"))])
    meant = [each for each in others if get_close_matches(run.name, [each.name], n=1)]
    hint = f"did you mean {meant[0]}?" if meant else f"run folders here: {', '.join(map(str, list(others)[:5]))}" if others else ""
    raise UserError(f"there is no folder {run}; {hint or 'give the folder that `tltrain train` made'}")


def check_runs(paths: Iterable[Path]) -> None:
    """`check_run` of each path that is no folder of folds."""
    for path in paths:
        if not (path / FOLDS).is_file():
            check_run(path)


def run_of_a_fit(folder: Path) -> Path | None:
    """The run within a folder of `tltrain fit`, beside the recipe that was chosen. None: it is no such folder, or has none yet."""
    inner = folder / "run"
    return inner if (inner / "recipe.yaml").is_file() and not (folder / "generations").exists() else None


def _runs_in(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(file.parent for file in folder.glob("*/recipe.yaml"))
    return []


def _user_cache() -> Path | None:
    """None for a user without a home folder, such as an unknown user id in a container."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "tltrain"
    with suppress(RuntimeError):
        return Path.home() / ".cache" / "tltrain"
    return None
