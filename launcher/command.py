"""Parses and checks the training command behind `--` (`train RECIPE …`) before anything is started.

Also builds the command that the job itself runs, which reads the recipe kept in the run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

from tltrain.core.arguments import parsing
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags, run_path
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import check_one_races
from tltrain.runs import run_dir
from tltrain.runs.listing.folders import AUTO, check_recipe, run_folder
from tltrain.runs.record import as_chosen


class FinishedRun(UserError):
    """The run is finished already, so nothing is started. Callers treat it as success."""


@dataclass(frozen=True)
class Training:
    """One run to start: its complete recipe, its run flags and its folder."""

    recipe: Recipe
    start: RunFlags
    run: Path

    @property
    def argv(self) -> list[str]:
        """Arguments of `tltrain` for the job. The recipe is the copy in the run folder, so later edits cannot change a queued job."""
        return ["train", str(run_dir.recipe_file(self.run)), *flags(self.start)]


def split(argv: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Split a command line into the launcher's own arguments and each `train RECIPE …` behind a `--`.

    Raises UserError where there is no such command, or where one does not start with `train`.
    """
    parts: list[list[str]] = [[]]
    for argument in argv:
        if argument == "--":
            parts.append([])
        else:
            parts[-1].append(argument)
    own, *trainings = parts
    if not trainings and not {"-h", "--help"} & set(own):
        raise UserError("the command to start is missing; write it behind --, such as: -- train digits-resnet --seed 1")
    for part in trainings:
        if part[:1] != ["train"]:
            raise UserError(f"the command behind -- is {' '.join(part) or 'empty'}; only `train RECIPE …` can be launched")
    return own, trainings


def read(argv: Sequence[str]) -> Training:
    """Parse `train RECIPE …` and check it against the run folder.

    Raises FinishedRun for a finished run, and UserError. For an unknown flag tyro exits the process with code 2.
    """
    return _checked(parse(argv))


def parse(argv: Sequence[str]) -> Training:
    """Parse `train RECIPE …` without looking at the run folder."""
    recipe, start = parsing.parse("train", argv[1:])
    run = run_folder(recipe, start).absolute()
    return Training(recipe, replace(start, folder=run), run)


def read_array(argv: Sequence[str], key: str, values: Sequence[str]) -> tuple[Path, list[Training]]:
    """One run for each value of a job array: the recipe with `key` set to that value.

    Returns (the folder that holds the runs, the runs in the order of the values). Raises UserError.
    """
    name, path = "--" + key, key.replace("-", "_")
    if any(argument.split("=")[0].replace("-", "_") == f"__{path}" for argument in argv):
        raise UserError(f"{name} stands in the command and in --array; leave it out of one of them")
    parsed = parsing.parse_with("train", argv[1:], [{path: None if value in ("None", "null") else value} for value in values])
    recipe, start = parsed[0]
    if start.folder == AUTO:
        raise UserError("--folder auto is for one run, and --array names a folder for each by its value; leave it out")
    parent = run_path(recipe, start).absolute()
    parent = parent.with_name(f"{parent.name}-by-{key}")
    runs = [Training(r, replace(s, folder=parent / v), parent / v) for (r, s), v in zip(parsed, values, strict=True)]
    try:
        return parent, [_checked(run) for run in runs]
    except FinishedRun as error:
        raise UserError(f"{error}. Leave that value out of --array") from None


def check_processes(training: Training, num_processes: int) -> None:
    """Check that this many processes can train it, before any of them waits in a queue. Raises UserError."""
    check_one_races(as_chosen(training.recipe, training.run), num_processes)


def flags(start: RunFlags) -> list[str]:
    """Run flags as command-line arguments. Those at their default are left out."""
    argv: list[str] = []
    for field in fields(RunFlags):
        value = getattr(start, field.name)
        default = None if field.default is MISSING else field.default
        if value == default:
            continue
        name = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(name if value else "--no-" + name[2:])
        elif isinstance(value, tuple):
            argv += [name, *value]
        else:
            argv += [name, str(value)]
    return argv


def _checked(training: Training) -> Training:
    check_recipe(training.run, training.recipe, training.start)
    if run_dir.outcome(training.run).get("outcome") == "finished":
        remedy = "choose another folder behind --: -- train RECIPE --folder ANOTHER"
        raise FinishedRun(f"{training.run} is finished already: see {run_dir.report_file(training.run)}, or {remedy}")
    return training
