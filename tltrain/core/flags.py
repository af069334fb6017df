"""Start-up flags: what changes nothing that is learned. And the words of `tltrain train` and `tltrain plan`, read without torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import ValidationError

from tltrain.core import recipe as recipes
from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe

LEAST = {
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
"""Flags by the names they had in 0.1, which 0.2 still understands: job scripts and run folders hold them."""


@dataclass(frozen=True)
class RunFlags:
    """How this start of a run goes about it. None of it changes what is learned."""

    folder: Path | None = None
    """The run folder; the default is runs/NAME of the recipe. The same command again resumes it."""
    max_device_batch: int | None = None
    """Largest micro-batch one device holds; a larger share of the batch is accumulated. A resumed run keeps its own; new runs take 128.
    Where the device has no room for it, the run halves it by itself, and keeps that."""
    recompute: bool = False
    """Compute activations of training blocks again in backward: less memory, about a third more time, the same result bit for bit."""
    compile: bool = False
    """Compile each stage's network by torch.compile: faster after a minute or so of compiling; the result differs by rounding. A
    resumed run keeps it."""
    workers: int | None = None
    """Data workers per process; the default is 0 for data in memory, else the processor cores divided by the processes, at most 8."""
    views: Literal["auto", "host", "device"] = "auto"
    """Make strong views by the data workers or on the GPU: the same pixels. By default where the measured rates say it is faster."""
    save_minutes: float = 10.0
    """Minutes between two checkpoints; stage ends are always saved."""
    save_steps: int | None = None
    """Optimizer steps between two checkpoints, beside the minutes."""
    keep: int = 2
    """Number of newest checkpoints kept."""
    check_steps: int = 500
    """Optimizer steps between two comparisons of all processes' weights; the first two steps and the end of each stage always are."""
    timeout_minutes: float = 10.0
    """A process of several that stays this long at one place ends itself and says which process is missing."""
    stale_seconds: float = 60.0
    """A run folder whose owner has given no sign of life for this long may be taken over."""
    take_over: bool = False
    """Take the run folder over from an owner that still seems to live; that one then stops by itself."""
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Mirror the metrics to Weights & Biases; online without a key becomes offline, and says so."""
    wandb_project: str = "tltrain"
    """The project there."""
    wandb_group: str | None = None
    """The group there; the default is the recipe's name, so that its seeds stand together."""
    wandb_weights: bool = False
    """Also upload the best weights as an artifact; a student's has its teacher's as its input."""
    trackers: tuple[str, ...] = ()
    """Trackers beside W&B that are told of the rows, plan and results, by the names that installed packages give them."""
    cache: Literal["auto", "always", "never"] = "auto"
    """Compute what is frozen once and keep it: where that saves time, always, or never. The result is the same, bit for bit."""
    cache_images: Literal["auto", "always", "never"] = "auto"
    """Keep decoded and resized images on the disk, as above."""
    cache_device_gb: float | None = None
    """Largest cache that is read from the GPU's memory, GB; the default is a quarter of what is free."""
    cache_memory_gb: float | None = None
    """Largest cache that is read from host memory, GB a process; the default is half of what is free, over the machine's processes."""
    cache_disk_gb: float | None = None
    """All caches together on the disk, GB; the least recently used are deleted beyond it. The default is half of what is free or theirs."""
    smoke: bool = False
    """Run everything for real in miniature: two steps a stage, one batch of evaluation."""

    def __post_init__(self) -> None:
        if self.compile and self.recompute:
            raise UserError(
                "--compile and --recompute exclude each other: a compiled network chooses itself what it computes again; drop one"
            )
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        for name in self.trackers:
            registry.check("trackers", name, f"--trackers has {name!r}")


def run_path(recipe: Recipe, start: RunFlags) -> Path:
    """The run folder of a recipe: as --folder says, else runs/NAME."""
    return start.folder or Path("runs") / (recipe.name + ("-smoke" if start.smoke else ""))


def say_renamed(old: str, new: str) -> None:
    """Tell the user the new name of a flag or verb, on standard error, once for all processes of a run."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{old} is now called {new}; the old name will go with the next version\n")


def _renamed(word: str) -> str:
    """A word of the command with a flag's present name: --store-images=never is --cache-images=never."""
    name, equals, value = word.partition("=")
    new = RENAMED.get(name[2:].replace("-", "_")) if name.startswith("--") else None
    if new is None:
        return word
    flag = f"--{new.replace('_', '-')}"
    say_renamed(name, flag)
    return f"{flag}{equals}{value}"


@dataclass(frozen=True)
class _Words:
    start: Annotated[RunFlags, tyro.conf.arg(name="")]
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]


def parse(verb: str, words: Sequence[str]) -> tuple[Recipe, RunFlags]:
    """Read ``RECIPE [flags and overrides]``. A mistake in the words ends the process with code 2 and a suggestion, as tyro does it."""
    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            words = ["digits-resnet", "--help"]
            sys.stdout.write(f"usage: tltrain {verb} RECIPE [flags and overrides]; shown with the values of digits-resnet\n")
        else:
            raise UserError(f"tltrain {verb} needs a recipe first: a shipped name (`tltrain recipes`) or a .yaml file")
    recipe = recipes.load(words[0])
    words = [words[0], *map(_renamed, words[1:])]
    try:
        config = (tyro.conf.AvoidSubcommands,)
        parsed = tyro.cli(
            _Words, default=_Words(RunFlags(), recipe), args=list(words[1:]), prog=f"tltrain {verb} {words[0]}", config=config
        )
    except ValidationError as error:
        raise UserError(recipes.explain(error, f"recipe {words[0]} with these overrides")) from error
    learned = recipes.validate(parsed.recipe.model_dump(), f"recipe {words[0]} with these overrides")
    return (learned.smoke() if parsed.start.smoke else learned), parsed.start
