"""Start-up flags, which do not change what is learned, and a parser of flags from a dataclass. Without torch."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from tltrain.core import registry
from tltrain.core.errors import UserError, unknown_argument
from tltrain.core.output import wrapping
from tltrain.core.recipe import Recipe

T = TypeVar("T")
MINIMUM = {
    "max_device_batch": 1,
    "workers": 0,
    "save_minutes": 0,
    "save_steps": 1,
    "keep": 1,
    "check_steps": 1,
    "timeout_minutes": 0.01,
    "stale_seconds": 0,
    "cache_device_gb": 0,
    "cache_memory_gb": 0,
    "cache_disk_gb": 0,
}

RENAMED = {f"store{rest}": f"cache{rest}" for rest in ("", "_images", "_device_gb", "_memory_gb", "_disk_gb")}
"""Old flag names of version 0.1 to their new names. 0.2 still accepts them, because job scripts and run folders use them."""


@dataclass(frozen=True)
class RunFlags:
    """How this start of a run executes the recipe. No flag changes what is learned."""

    folder: Path | None = None
    """The run folder; the default is runs/NAME, by the recipe's name; auto takes the first of runs/NAME, runs/NAME-2, ... that is free or
    holds this very recipe. The same command again resumes the run."""
    max_device_batch: int | None = None
    """Largest micro-batch on one device; a larger share of the batch is accumulated. The default is 128; a resumed run keeps its own value.
    When the device runs out of memory, the run halves it and keeps the new value."""
    recompute: bool = False
    """Recompute the activations of training blocks in backward: less memory, about a third more time, the same result bit for bit."""
    compile: bool = False
    """Compile each stage's network with torch.compile: faster after about a minute of compiling; the result differs by rounding. A
    resumed run keeps this setting."""
    workers: int | None = None
    """Data workers per process; the default is 0 for data in memory, else the processor cores divided by the processes, at most 16."""
    views: Literal["auto", "host", "device"] = "auto"
    """Make strong views by the data workers or on the GPU, with the same pixels. auto takes the faster one, by measured rates."""
    save_minutes: float = 10.0
    """Minutes between two checkpoints; the end of a stage is always saved."""
    save_steps: int | None = None
    """Optimizer steps between two checkpoints, in addition to the minutes."""
    keep: int = 2
    """Number of newest checkpoints kept."""
    check_steps: int = 500
    """Optimizer steps between two comparisons of all processes' weights; the first two steps and each stage's end are always compared."""
    timeout_minutes: float = 10.0
    """A process that waits this long for the others ends itself and names the missing process."""
    stale_seconds: float = 60.0
    """A run folder whose owner has sent no heartbeat for this long may be taken over."""
    take_over: bool = False
    """Take the run folder over from an owner that still seems to run; the old owner then stops by itself."""
    accept_data_change: bool = False
    """Go on with a run whose images have changed since it began: known images keep their split, new ones are left out. Where a class
    came, went or changed its name, it is refused all the same."""
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Mirror the metrics to Weights & Biases; online without a key becomes offline, with a message."""
    wandb_project: str = "tltrain"
    """The project in Weights & Biases and Trackio, and the experiment in MLflow."""
    wandb_group: str | None = None
    """The group in Weights & Biases and Trackio, and a tag in MLflow; the default is the recipe's name, which groups its seeds."""
    wandb_weights: bool = False
    """Also upload the best weights as an artifact; a student's artifact names its teacher's as input."""
    trackers: tuple[str, ...] = ()
    """Trackers that get the metrics, plan and results: tensorboard, mlflow, trackio, wandb, and those of installed packages; several with
    spaces or commas between them."""
    cache: Literal["auto", "always", "never"] = "auto"
    """Cache the outputs of frozen blocks: auto where it saves time, always, or never. The result is the same bit for bit."""
    cache_images: Literal["auto", "always", "never"] = "auto"
    """Cache decoded and resized images on the disk: auto where it saves time, always, or never."""
    cache_device_gb: float | None = None
    """Largest cache that is read from GPU memory, GB; the default is a quarter of the free memory."""
    cache_memory_gb: float | None = None
    """Largest cache that is read from host memory, GB a process; the default is half of the free memory, divided by the processes."""
    cache_disk_gb: float | None = None
    """Disk budget of all caches, GB; the least recently used are deleted. The default is half of the space that is free or theirs."""
    smoke: bool = False
    """A short test of the whole run: two steps a stage, one batch of evaluation."""

    def __post_init__(self) -> None:
        if self.compile and self.recompute:
            raise UserError("--compile and --recompute exclude each other: torch.compile itself decides what to recompute; drop one")
        for name, minimum in MINIMUM.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {minimum}")
        names = tuple(name for word in self.trackers for name in word.split(",") if name)
        object.__setattr__(self, "trackers", names)  # --trackers tensorboard,wandb is one word
        for name in names:
            registry.check("trackers", name, f"--trackers has {name!r}")


def run_path(recipe: Recipe, run_flags: RunFlags) -> Path:
    """The run folder of a recipe: --folder, else runs/NAME."""
    return run_flags.folder or Path("runs") / (recipe.name + ("-smoke" if run_flags.smoke else ""))


def is_first_process() -> bool:
    """Whether this is rank 0 by the launcher's environment, before torch.distributed starts. True without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def say_renamed(old: str, new: str) -> None:
    """Print the new name of a flag or verb to standard error, once for all processes of a run."""
    if is_first_process():
        wrapping.say(f"{old} is now called {new}; the old name will go with the next version", sys.stderr)


def renamed(argument: str) -> str:
    """An argument with its flag's old name replaced by the new one: --store-images=never becomes --cache-images=never."""
    name, equals, value = argument.partition("=")
    new = RENAMED.get(name[2:].replace("-", "_")) if name.startswith("--") else None
    if new is None:
        return argument
    flag = f"--{new.replace('_', '-')}"
    say_renamed(name, flag)
    return f"{flag}{equals}{value}"


def parse_flags(default: T, argv: Sequence[str], prog: str, description: str | None = None, short: Sequence[str] = ()) -> T:
    """Parse the fields of a dataclass as flags, with `default`'s values. Raises UserError for a mistake; --help ends the process.

    short: other flags that the command knows, which a flag that it does not know may stand for.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed, unknown = tyro.cli(
                type(default), default=default, args=list(argv), prog=prog, description=description, return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
            )  # fmt: skip
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_without_box(printed.getvalue())}; see `{prog} --help`") from None
    sys.stderr.write(printed.getvalue())
    if unknown:
        names = [field.name for part in vars(default).values() for field in (fields(part) if is_dataclass(part) else ())]
        recipe = getattr(default, "recipe", None)
        known = [*short, *(f"--{name}".replace("_", "-") for name in (*names, *(recipe.flat() if recipe is not None else ())))]
        raise UserError(f"{unknown_argument(unknown, known)}; see `{prog} --help`")
    return parsed


def _without_box(text: str) -> str:
    """tyro's message out of the box that it draws, of lines or, where the terminal has none, of dashes: what follows the title."""
    text = _COLOUR.sub("", text)  # on a terminal with colours it colours each word
    lines = [line.strip("│ ") for line in text.splitlines()[1:]]
    parts = [" ".join(part) for rule, part in itertools.groupby(lines, lambda line: not line.strip("─-")) if not rule]
    message = _of_a_value(_plainly(parts[0].rstrip(".") if parts else text.strip()))
    return message[:1].lower() + message[1:]


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = re.compile(r"error parsing (\S+): .*\b(int|float)\b.*: (.+)", re.IGNORECASE)
_UNION = re.compile(r"error parsing (\S+): no type matching (.+?) could be instantiated from \[(.+)\]", re.IGNORECASE)
_CHOICE = re.compile(r"invalid choice (.+) for argument '(\S+)'\. Expected one of \((.+?),?\)", re.IGNORECASE)
_MISSING = re.compile(r"missing value for argument '(\S+)'\. Expected 1 values", re.IGNORECASE)


def _of_a_value(message: str) -> str:
    """tyro's mistakes in a value as others are said: the value and the rule, without names of Python's types."""
    if (found := _CHOICE.match(message)) is not None:
        return f"{found[2]} is {found[1]}; it must be one of {found[3].replace(chr(39), '')}"
    if (found := _MISSING.match(message)) is not None:
        return f"{found[1]} needs a value behind it"
    if (found := _UNION.match(message) or _NUMBER.match(message)) is None:
        return message
    num, whole = len(re.findall("INT|FLOAT", found[2])), "int" in found[2].lower()
    rule = f"{num} numbers" if num > 1 else "a whole number" if whole else "a number"
    given = found[3].replace("', '", " ")
    return f"{found[1]} is {given}; it must be {rule}" + (" or None" if "None" in found[2] else "")


_OF_PYDANTIC = re.compile(r"Error parsing recipe\.([\w.]+): \d+ validation errors? for \w+ ")
_MISTAKE = re.compile(r"(?:Value error, |(\w+) )(.+?) \[type=\w+, input_value=(.*?), input_type=\w+\](?: For further \w+ visit \S+)?")


def _plainly(message: str) -> str:
    """pydantic's mistakes in a part of the recipe as those of the whole are said: path, value, rule."""
    head = _OF_PYDANTIC.match(message)
    found = _MISTAKE.findall(message, head.end()) if head else []
    said = [f"{head[1]}{'.' * bool(name)}{name}: {_of_rule(rule, value if name else '')}" for name, rule, value in found if head]
    return "; ".join(said) or message


def _of_rule(rule: str, value: str) -> str:
    """Our own rules name the value themselves, or leave it out: a URL may hold a password."""
    own = rule.removeprefix("Value error, ")
    return own if own != rule or not value else f"{value}: {rule[:1].lower()}{rule[1:]}"
