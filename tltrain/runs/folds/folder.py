"""The folder of a cross-validation: folds.json, and a run folder for each fold of each repeat, r0-f0, r0-f1, and so on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tltrain.core import files, paths, untrusted
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags, run_path
from tltrain.core.recipe import Recipe
from tltrain.runs import run_dir
from tltrain.runs.links import check_links
from tltrain.runs.listing.folders import AUTO

NAME = paths.FOLDS
MOST = 1_000
"""Folds and repeats of a folder that may come from somebody else."""


@dataclass(frozen=True)
class Member:
    """One run: a fold of a repeat."""

    repeat: int
    fold: int
    path: Path


@dataclass(frozen=True)
class FoldsFolder:
    """The number of folds and of repeats."""

    path: Path
    k: int
    repeats: int

    @property
    def members(self) -> list[Member]:
        """Every run, repeat by repeat, whether it has begun or not."""
        return [Member(r, f, self.path / f"r{r}-f{f}") for r in range(self.repeats) for f in range(self.k)]


def changes(k: int, repeats: int) -> list[dict[str, int]]:
    """The recipe changes of each run (path to value), in the order of `FoldsFolder.members`. Raises UserError."""
    if k < 2:
        raise UserError(f"--k is {k}; a network must learn from other images than it is tested on: give 2 or more folds")
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}; it must be at least 1")
    return [{"data.folds": k, "data.fold": f, "data.repeat": r} for r in range(repeats) for f in range(k)]


def wanted_folder(parsed: Sequence[tuple[Recipe, RunFlags]], k: int, repeats: int) -> FoldsFolder:
    """The folder of the runs: --folder, else runs/NAME-folds. For --folder auto the first of it, runs/NAME-folds-2, ... that may be taken.

    parsed: the recipe and the flags of each run, in the order of `FoldsFolder.members`.
    """
    recipe, start = parsed[0]
    if start.folder is not None and start.folder != AUTO:
        return FoldsFolder(start.folder, k, repeats)
    own = run_path(recipe, replace(start, folder=None))
    first = FoldsFolder(own.with_name(f"{own.name}-folds"), k, repeats)
    if start.folder is None:
        return first
    numbered = (replace(first, path=first.path.with_name(f"{first.path.name}-{n}")) for n in itertools.count(2))
    return next(each for each in itertools.chain([first], numbered) if _may_take(each, [recipe for recipe, _ in parsed]))


def _may_take(wanted: FoldsFolder, recipes: Sequence[Recipe]) -> bool:
    try:
        check(wanted, recipes)
    except UserError:
        return False
    return True


def is_folds(path: Path) -> bool:
    """Whether a path is the folder of a cross-validation."""
    return (path / NAME).is_file()


def read(path: Path) -> FoldsFolder:
    """Read the folder of a cross-validation. It may come from somebody else, so its values are checked. Raises UserError."""
    if not is_folds(path):
        raise UserError(f"{path} is no folder of folds: it has no {NAME}; give the folder that `tltrain folds` made")
    raw: Any = untrusted.read_json(path / NAME)
    values = [raw.get(key) for key in ("k", "repeats")] if isinstance(raw, dict) else [None]
    if not all(isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST for value in values):
        raise UserError(
            f"{path / NAME} is damaged: k and repeats are {untrusted.cut(values)}; copy it from a backup, or run `tltrain folds` again"
        )
    return FoldsFolder(path, *values)


def check(wanted: FoldsFolder, recipes: Sequence[Recipe]) -> None:
    """Check that the folder is empty, or holds runs of these recipes alone. Raises UserError, with the differences.

    recipes: one for each of `wanted.members`.
    """
    path = wanted.path
    if path.exists() and not is_folds(path) and (not path.is_dir() or any(not files.is_temporary(p, path / NAME) for p in path.iterdir())):
        what = (
            "is the folder of a run" if run_dir.recipe_file(path).is_file() else f"holds files and is no folder of folds (it has no {NAME})"
        )
        raise UserError(f"{path} {what}; choose another with --folder, such as --folder auto")
    for member, recipe in zip(wanted.members, recipes, strict=True):
        run_dir.check_recipe(member.path, recipe)


def create(wanted: FoldsFolder) -> FoldsFolder:
    """Create the folder. One of fewer repeats is widened. Returns it with all repeats that were ever asked for. Raises UserError."""
    repeats = max(wanted.repeats, read(wanted.path).repeats) if is_folds(wanted.path) else wanted.repeats
    kept = FoldsFolder(wanted.path, wanted.k, repeats)
    check_links(wanted.path)
    try:
        wanted.path.mkdir(parents=True, exist_ok=True)
        files.write_json(wanted.path / NAME, {"k": kept.k, "repeats": kept.repeats})
    except OSError as error:
        raise UserError(f"the folder {wanted.path} cannot be written: {error}; choose another with --folder") from error
    return kept


def unfinished(wanted: FoldsFolder, parsed: Sequence[tuple[Recipe, RunFlags]]) -> list[tuple[Recipe, RunFlags]]:
    """The recipe and the flags of each run that is not finished, with its own folder.

    parsed: one for each of `wanted.members`.
    """
    return [
        (recipe, replace(start, folder=member.path))
        for member, (recipe, start) in zip(wanted.members, parsed, strict=True)
        if run_dir.outcome(member.path).get("outcome") != "finished"
    ]
