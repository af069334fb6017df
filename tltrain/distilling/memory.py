"""The plan in the folder of a distillation, so that the same command resumes with the same recipe after a stop."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.fitting.choose import Draft
from tltrain.fitting.memory import damaged, read_asked, unwritable
from tltrain.runs.links import check_links

NAME = "distil.json"
VERSION = 2
"""Version of the file's format."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before training."""

    values: dict[str, Any]
    """Of the recipe."""
    reasons: dict[str, str]
    head: tuple[str, ...]
    """Lines of comment above the recipe."""
    lines: tuple[str, ...]
    """The cost, as it is printed before the start."""
    taught: dict[str, Any]
    """Fingerprints of the teachers and their data (`teachers.identity`)."""

    @property
    def draft(self) -> Draft:
        return Draft(self.values, self.reasons)


def read(folder: Path, asked: dict[str, Any]) -> Plan | None:
    """The plan of a folder. None for a folder that is not there yet.

    Raises UserError for a folder of something else, and for one where something else was asked.
    """
    file = folder / NAME
    raw = read_asked(file, "distillation", asked, _same)
    if raw is None:
        return None
    if raw.get("version") != VERSION:
        raise UserError(f"{folder} holds a distillation of another version of tltrain; go on with that version, or choose another folder "
                        "with --folder")  # fmt: skip
    try:
        plan = raw["plan"]
        head, lines = (tuple(map(str, plan[key])) for key in ("head", "lines"))
        return Plan(dict(plan["values"]), dict(plan["reasons"]), head, lines, dict(plan["taught"]))
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(file) from error


def _same(key: str, kept: Any, asked: Any) -> bool:
    """Whether the same was asked. Runs are the same however their paths are spelled."""
    if key != "runs" or not isinstance(kept, list):
        return bool(kept == asked)
    return [Path(str(run)).expanduser().resolve() for run in kept] == [Path(run).expanduser().resolve() for run in asked]


def check_taught(folder: Path, plan: Plan, taught: dict[str, Any]) -> None:
    """Check that teachers and images are those that the recipe was chosen for. Raises UserError."""
    changed = [key for key in {**plan.taught, **taught} if plan.taught.get(key) != taught.get(key)]
    if changed:
        raise UserError(
            f"{folder}: the {' and the '.join(changed)} are not those that this distillation began with, so that its student may be tested "
            "on what its teacher learned from; put them back, or choose another folder with --folder"
        )


def keep(folder: Path, asked: dict[str, Any], plan: Plan) -> None:
    """Write the plan, and make the folder where it is absent. Raises UserError."""
    check_links(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / NAME, {"version": VERSION, "asked": asked, "plan": asdict(plan)})
    except OSError as error:
        raise unwritable(folder, error) from error


def write(file: Path, text: str) -> None:
    """Write a file of the folder. Raises UserError."""
    try:
        files.write_atomic(file, text)
    except OSError as error:
        raise unwritable(file.parent, error) from error
