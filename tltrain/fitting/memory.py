"""The plan in the folder of a fit, so that the same command resumes after a stop and makes the same choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tltrain.core import files, untrusted
from tltrain.core.errors import UserError
from tltrain.fitting.choose import Chosen, Depth
from tltrain.fitting.facts import Facts
from tltrain.fitting.written import check_unedited
from tltrain.runs.links import check_links

NAME = "fit.json"
VERSION = 2
"""Version of the file's format. Version 1 had no version number, and did not list the probed images."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before training."""

    facts: Facts
    chosen: Chosen
    depths: tuple[Depth, ...]
    beyond: str
    """Depths that do not fit into the time, as a sentence; empty if all do."""
    judged: tuple[str, ...]
    """The probed images: all of train and val, or some of each class."""
    right: tuple[str, ...]
    """Those of `judged` that the solved head predicts right, out of fold."""
    probed: tuple[str, ...]
    """A line for each backbone."""


@dataclass
class Memory:
    """The folder of a fit."""

    folder: Path
    asked: dict[str, Any]
    plan: Plan | None
    of_another: bool = False
    """Whether another version of this program wrote it, so that its plan cannot be read."""
    recipes: tuple[str, ...] = ()
    """The recipe as it was written: by a dry run, and after the race."""

    @classmethod
    def open(cls, folder: Path, asked: dict[str, Any]) -> Self:
        """Raises UserError for a folder of something else, and for one where something else was asked."""
        file = folder / NAME
        raw = read_asked(file, "fit", asked, lambda _, kept, now: bool(kept == now))
        if raw is None:
            return cls(folder, asked, None)
        if raw.get("version") != VERSION:
            return cls(folder, asked, None, of_another=True)
        recipes = raw.get("recipes", [])
        if not isinstance(recipes, list):
            raise damaged(file)
        return cls(folder, asked, _plan(file, raw.get("plan")), recipes=tuple(map(str, recipes)))

    def keep(self, plan: Plan) -> Plan:
        """Write the plan."""
        self.plan = plan
        self._make_folder()
        self._write()
        return plan

    def _write(self) -> None:
        plan = None if self.plan is None else asdict(self.plan)
        try:
            files.write_json(self.folder / NAME, {"version": VERSION, "asked": self.asked, "plan": plan, "recipes": list(self.recipes)})
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def check_recipe(self, name: str) -> None:
        """Check that the recipe is as it was written. Raises UserError."""
        if self.recipes:
            check_unedited(self.folder / name, self.recipes)

    def write_recipe(self, name: str, text: str) -> Path:
        """Write the recipe. Returns its path. Raises UserError, also where a person has changed it."""
        self.check_recipe(name)
        if text not in self.recipes:  # kept before it is written, so that a kill in between leaves no file of unknown origin
            self.recipes = (*self.recipes, text)
            self._write()
        try:
            files.write_atomic(self.folder / name, text)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return self.folder / name

    def _make_folder(self) -> None:
        check_links(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error


def _plan(file: Path, raw: Any) -> Plan | None:
    if raw is None:
        return None
    try:
        depths = tuple(Depth(**depth) for depth in raw["depths"])
        texts = {name: tuple(map(str, raw[name])) for name in ("judged", "right", "probed")}
        return Plan(Facts(**raw["facts"]), Chosen(**raw["chosen"]), depths, str(raw["beyond"]), **texts)
    except (TypeError, KeyError, AttributeError) as error:
        raise damaged(file) from error


def read_asked(file: Path, what: str, asked: dict[str, Any], same: Callable[[str, Any, Any], bool]) -> dict[str, Any] | None:
    """The JSON file of an earlier call with the same arguments. None if the folder does not exist yet, or is empty.

    what: fit or distillation, for messages. same: whether (argument, its value then, its value now) are the same.
    Raises UserError for a folder that holds something else, and for one of other arguments.
    """
    folder = file.parent
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(not files.is_temporary(path, file) for path in folder.iterdir())):
            raise UserError(f"{folder} holds files and is no folder of a {what} (it has no {file.name}); choose another with --folder")
        return None
    raw = untrusted.read_json(file)
    kept = raw.get("asked") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(kept, dict):
        raise damaged(file)
    changed = [f"{key}: {kept.get(key)} -> {value}" for key, value in asked.items() if not same(key, kept.get(key), value)]
    if changed:
        raise UserError(f"{folder} holds a {what} of something else (its own -> yours):\n  " + "\n  ".join(changed)
                        + "\nchoose another folder with --folder, or delete it")  # fmt: skip
    return raw


def unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"the folder {folder} cannot be written: {error}; choose another with --folder")


def damaged(file: Path) -> UserError:
    return UserError(f"{file} is damaged; copy it from a backup, or delete {file.parent} and begin anew")
