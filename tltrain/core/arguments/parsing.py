"""Reads `RECIPE [DATA] [flags and overrides]`, which `tltrain train`, `plan`, `preview` and `sweep` share."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro
from pydantic import ValidationError

from tltrain.core import errors
from tltrain.core import recipe as recipes
from tltrain.core.arguments import short_help, words
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags, is_first_process, parse_flags, renamed
from tltrain.core.output import wrapping
from tltrain.core.recipe import Recipe


@dataclass(frozen=True)
class _Arguments:
    run_flags: Annotated[RunFlags, tyro.conf.arg(name="")]
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]


def parse(verb: str, argv: Sequence[str]) -> tuple[Recipe, RunFlags]:
    """Parse ``RECIPE [DATA] [flags and overrides]``. Says on standard error what was decided. Raises UserError; --help ends the process."""
    return parse_with(verb, argv, [{}])[0]


def parse_with(verb: str, argv: Sequence[str], changes: Sequence[Mapping[str, Any]]) -> list[tuple[Recipe, RunFlags]]:
    """Parse once as `parse` does, and override the recipe by each of `changes`, path to value. Raises UserError."""
    if {"-h", "--help"} & set(argv):
        name = argv[0] if not argv[0].startswith("-") else None
        short_help.show(verb, name, recipes.load(name or short_help.SHOWN), whole="all" in argv)
        sys.exit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError(
            f"tltrain {verb} needs a recipe first: a shipped name (`tltrain recipes`) or a .yaml file; such as\n  {words.usual(verb)}"
        )
    recipe = words.load(verb, argv[0])
    typed = words.understood(recipe, [renamed(word) for word in argv[1:]])
    recipe = recipe.override(typed.changes) if typed.changes else recipe
    try:
        parsed = parse_flags(
            _Arguments(RunFlags(), recipe), typed.rest, f"tltrain {verb} {argv[0]}", short=(*words.SHORT, *short_help.own_flags(verb))
        )
    except UserError as error:
        raise UserError(_as_typed(str(error), recipe, argv)) from error
    except ValidationError as error:
        raise UserError(errors.explain(error, f"recipe {argv[0]} with these overrides", recipes.keys_at)) from error
    for note in [*typed.notes, *_unused(verb, parsed.run_flags)]:
        _say(note)
    overridden = [recipe.override({**parsed.recipe.model_dump(mode="json"), **change}) for change in changes]
    return [((learned.smoke() if parsed.run_flags.smoke else learned), parsed.run_flags) for learned in overridden]


def _as_typed(message: str, recipe: Recipe, argv: Sequence[str]) -> str:
    """The message with stages by their names, where they were typed so."""
    for i, stage in enumerate(recipe.stages):
        if any(word.startswith(f"--stages.{stage.name}.") for word in argv):
            message = message.replace(f"--stages.{i}.", f"--stages.{stage.name}.")
    return message


def _unused(verb: str, start: RunFlags) -> list[str]:
    """A note where a verb does not use a flag that was given: whoever puts plan in the place of train need not take it out."""
    used = short_help.USED.get(verb)
    given = [field.name for field in fields(RunFlags) if getattr(start, field.name) != field.default]
    unused = [f"--{name.replace('_', '-')}" for name in given if used is not None and name not in used]
    return [f"tltrain {verb} does not use {', '.join(unused)}"] if unused else []


def _say(note: str) -> None:
    """Print a note to standard error, once for all processes of a run."""
    if is_first_process():
        wrapping.note(note)
