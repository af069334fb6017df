"""UserError: a mistake that the user can correct. Its message gives the value, the rule and the remedy."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """A mistake that the user can correct. The command prints only the message, without a stack trace, and exits with code 2."""


class MachineError(UserError):
    """The machine failed, not the user: a killed worker, a disk that does not answer. Exit code 1: the same command may go on as it is."""


class StoppedAtOnce(KeyboardInterrupt):
    """A signal asked the run to stop before its first step, when there is nothing to save. As KeyboardInterrupt, it is no Exception."""

    recorded = False
    """Whether the outcome of the start is written already."""


AFTER_THE_END = (
    "the main program has ended while a thread of it trains, and Python then starts no thread and no process any more; "
    "let the main program wait for the thread: thread.join()"
)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where it has none. A library's message may go on for pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, at most 200 characters of it, without its stop."""
    return first_line(error).split(". ")[0].rstrip(".")[:200]


LISTED = 20
"""Number of files or classes that one message names. The rest is only counted."""


def some(names: Sequence[str], total: int | None = None) -> str:
    """The names as one string: at most LISTED of them, then the number of the others.

    total: how many there are, where `names` are the first of them, at least LISTED.
    """
    num = len(names) if total is None else total
    rest = f", and {num - LISTED} more" if num > LISTED else ""
    return ", ".join(names[:LISTED]) + rest


def explain(error: ValidationError, origin: str, keys_at: Callable[[tuple[int | str, ...]], list[str]]) -> str:
    """Pydantic's errors, one line each: the path, the value, the rule, and for an unknown key the nearest known one.

    origin: what was read. keys_at: the keys that a path, such as ("stages", 0), can have.
    """
    lines = [f"{origin}:"]
    errors = error.errors()
    inner = [e["loc"] for e in errors]
    for e in errors:
        if e["type"] == "too_short" and any(len(loc) > len(e["loc"]) and loc[: len(e["loc"])] == e["loc"] for loc in inner):
            continue  # the list is too short only because its items are wrong, and those have their own lines
        where = ".".join(str(part) for part in e["loc"]) or "recipe"
        if e["type"] == "extra_forbidden":
            known = keys_at(e["loc"][:-1])
            near = get_close_matches(str(e["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"  {where}: unknown key; {hint}")
        elif e["type"] == "missing":
            lines.append(f"  {where}: required and missing")
        elif e["type"] == "value_error":
            lines.append(f"  {where}: {e['ctx']['error']}")
        else:
            lines.append(f"  {where}: {e['input']!r}: {e['msg'][0].lower()}{e['msg'][1:]}")
    return "\n".join(lines)


_CHOICE = re.compile(r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)")
_VALUE = re.compile(r"argument (\S+): invalid (int|float) value: (.+)")
_BARE = re.compile(r"argument (\S+): expected (?:one|at least one) argument")
"""What argparse says of a value, which is said as the flags of a recipe say it."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError for a mistake, so that it is printed like any other mistake of the user."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.typed = set(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = unknown_argument(unknown.split(" "), [name for action in self._actions for name in action.option_strings])
        if (choice := _CHOICE.fullmatch(message)) is not None:
            named = f"{choice[1]} is {choice[2]}; it must be one of" if choice[1].startswith("-") else f"{choice[2]} is none of"
            message = f"{named} {choice[3].replace(chr(39), '')}"
        elif (value := _VALUE.fullmatch(message)) is not None:
            message = f"{value[1]} is {value[3]}; it must be {'a whole number' if value[2] == 'int' else 'a number'}"
        elif (bare := _BARE.fullmatch(message)) is not None:
            message = f"{bare[1]} needs a value behind it"
        if message.startswith("the following arguments are required"):
            greedy = [action for action in self._actions if action.nargs in ("?", "+", "*") and self.typed & {*action.option_strings}]
            message += "".join(f" ({action.option_strings[0]} takes what stands behind it: put it last)" for action in greedy[:1])
        raise UserError(f"{message}; see `{self.prog} --help`")


def parser_of(verb: str, function: Callable[..., int]) -> Parser:
    """The parser of a verb, described by its function's docstring."""
    return Parser(prog=f"tltrain {verb}", description=function.__doc__)


def unknown_argument(arguments: Iterable[str], known: Iterable[str]) -> str:
    """The message for arguments that a parser does not know. known: its flags, with their dashes."""
    first = next((word for word in arguments if word.startswith("-")), None)
    if first is None:
        return f"there is no place for {' '.join(arguments)}"
    first = first.partition("=")[0]
    named = {flag.lstrip("-"): flag for flag in known}  # dashes are in all, and would make strangers alike
    meant = [flag for flag in _MEANT.get(first.replace("_", "-"), ()) if flag in named.values()]
    near = meant or get_close_matches(first.lstrip("-"), named, n=1, cutoff=0.65)
    return f"there is no flag {first}" + (f" (did you mean --{near[0].lstrip('-')}?)" if near else "")


_MEANT = {
    "--folds": ("--k",),
    "--output": ("--out", "--folder"),
    "--output-dir": ("--out", "--folder"),
    "--learning-rate": ("--lr",),
    "--image-size": ("--size",),
    "--img-size": ("--size",),
    "--model": ("--backbone.name",),
    "--backbone": ("--backbone.name",),
    "--weights": ("--backbone.weights",),
    "--pretrained": ("--backbone.weights",),
}
"""Flags that other programs have, and those that are meant here, the likeliest first, where letters do not tell."""
