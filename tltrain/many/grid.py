"""The grid of `--over` (every combination of some recipe values, each with its own folder), and the rungs of `--halving`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from tltrain.core.arguments import words
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags, run_path
from tltrain.core.recipe import Recipe
from tltrain.runs.listing.folders import AUTO

MOST = 1_000
"""Runs of one sweep."""
SEEDS = ("seed", "data.seed")
"""Values that are repeated rather than chosen between."""


@dataclass(frozen=True)
class Axis:
    """One --over: a value of the recipe, as it was typed, and what it is to be."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    """Of its folder."""
    values: Mapping[str, str]
    """The value of each axis."""
    recipe: Recipe
    start: RunFlags

    @property
    def path(self) -> Path:
        assert self.start.folder is not None
        return self.start.folder

    @property
    def choice(self) -> tuple[str, ...]:
        """The values apart from seeds. Members with equal choices are repeats."""
        return tuple(f"{key}={value}" for key, value in self.values.items() if key not in SEEDS)


def axis(text: str) -> Axis:
    """seed=0..4 or stages.head.lr=1e-3,3e-3. Raises UserError."""
    key, _, values = text.partition("=")
    key, span = key.removeprefix("--"), re.fullmatch(r"(-?\d+)\.\.(-?\d+)", values)
    if span:
        first, last = map(int, span.groups())
        if not 0 <= last - first < MOST:
            raise UserError(f"--over is {text}; a range goes upwards and has at most {MOST} values, such as seed=0..4")
        return Axis(key, tuple(map(str, range(first, last + 1))))
    if re.fullmatch(r"-?\d+\.\.\w*|\w*\.\.-?\d+", values):
        raise UserError(f"--over is {text}; a range stands between two whole numbers, such as {key}=0..4")
    listed = tuple(values.split(","))
    if not key or not all(listed) or len(set(listed)) < len(listed):
        raise UserError(
            f"--over is {text!r}; it must be a value of the recipe and what it is to be, each once, such as seed=0..4 or lr=1e-3,3e-3"
        )
    return Axis(key, listed)


def check_typed_once(axes: Sequence[Axis], argv: Sequence[str]) -> None:
    """Raise UserError where a value of --over was given a value by itself as well."""
    typed = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    for each in axes:
        if each.key in typed:
            raise UserError(f"--{each.key} stands in the command and in --over; leave it out of one of them")


def check_over_typed(argv: Sequence[str]) -> None:
    """Raise UserError where seed=0..4 stands behind the recipe without --over, in the place of the data."""
    if len(argv) > 1 and re.fullmatch(r"[a-z][\w.]*=.+", argv[1]) and words.source_of(argv[1]) is None:
        raise UserError(f"{argv[1]} stands in the place of the data; you probably mean:\n  tltrain sweep {argv[0]} --over {argv[1]}")


def folder_of(recipe: Recipe, start: RunFlags) -> Path:
    """The folder of the runs: --folder, else runs/NAME-sweep. Raises UserError."""
    if start.folder == AUTO:
        raise UserError("--folder auto is for one run; a sweep has a folder for each, so that the same command goes on: leave it out")
    own = run_path(recipe, start)
    return start.folder or own.with_name(f"{own.name}-sweep")


def members(recipe: Recipe, start: RunFlags, axes: Sequence[Axis]) -> list[Member]:
    """Every combination of the values, the last axis fastest. Raises UserError for a value that the recipe does not take."""
    if not axes:
        raise UserError("tltrain sweep needs --over: what to vary, such as --over seed=0..4 --over stages.head.lr=1e-3,3e-3")
    if len({each.key for each in axes}) < len(axes):
        raise UserError(f"--over has {', '.join(each.key for each in axes)}; give each once, with all its values")
    if (num := math.prod(len(each.values) for each in axes)) > MOST:
        raise UserError(f"--over asks for {num:,} runs; at most {MOST:,} are one sweep")
    parent, found = folder_of(recipe, start), list[Member]()
    for values in itertools.product(*(each.values for each in axes)):
        chosen = {each.key: value for each, value in zip(axes, values, strict=True)}
        learned = recipe
        for key, value in chosen.items():
            learned = learned.override(_changes(learned, key, value))
        learned = learned.smoke() if start.smoke else learned
        name = "_".join(f"{_short(key)}-{_plain(value)}" for key, value in chosen.items())
        found.append(Member(name, chosen, learned, replace(start, folder=parent / name)))
    if len({each.name for each in found}) < len(found):
        raise UserError("two of the runs would have the same folder, as their values differ in signs alone; write them differently")
    return found


def _changes(recipe: Recipe, key: str, value: str) -> dict[str, Any]:
    if f"--{key}" in words.SHORT:
        return words.understood(recipe, [f"--{key}", value]).changes
    return {words.numbered(recipe, f"--{key}").removeprefix("--").replace("-", "_"): None if value in ("None", "null") else value}


def _short(key: str) -> str:
    """The end of a key that tells axes apart: head.lr of stages.head.lr."""
    return re.sub(r"[^A-Za-z0-9.]", "-", key.removeprefix("stages.").removeprefix("data.").removeprefix("backbone."))


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-.") or "x"


@dataclass(frozen=True)
class Rung:
    """One round of successive halving (Jamieson and Talwalkar 2016): all that are left, at a part of the whole length."""

    number: int
    part: Fraction
    """Of the length of the recipe; 1 in the last."""
    keep: int
    """Choices that go on to the next."""

    @property
    def name(self) -> str:
        return f"rung-{self.number}"


def rungs(num_choices: int, keep_one_in: int) -> list[Rung]:
    """The rungs for so many choices: each keeps one in N, and the last trains at full length. Raises UserError."""
    if keep_one_in < 2:
        raise UserError(f"--halving is {keep_one_in}; one in so many goes on, so that it must be at least 2")
    if num_choices < 2:
        raise UserError("--halving chooses between recipes, and --over names values of a seed alone; leave it out, or vary something else")
    kept = [num_choices]
    while kept[-1] > 1:
        kept.append(math.ceil(kept[-1] / keep_one_in))
    last = len(kept) - 1
    return [Rung(i, Fraction(1, keep_one_in ** (last - i)), kept[min(i + 1, last)]) for i in range(last + 1)]


def on_rung(member: Member, rung: Rung) -> Member:
    """The run of a member on a rung: a whole run of a shortened recipe, with its seed.

    It is no beginning of the long run: a schedule that ends at zero is over on each rung, so that what is compared are finished networks.
    """
    if rung.part == 1:
        return member
    path = member.path
    return replace(
        member, recipe=shortened(member.recipe, rung.part), start=replace(member.start, folder=path.parent / rung.name / path.name)
    )


def shortened(recipe: Recipe, part: Fraction) -> Recipe:
    """The recipe with every stage at a part of its length, and drops of its learning rate at the same share of it."""
    changes: dict[str, Any] = {}
    for i, stage in enumerate(recipe.stages):
        if stage.epochs is not None:
            changes[f"stages.{i}.epochs"] = stage.epochs * float(part)
        if stage.steps is not None:
            changes[f"stages.{i}.steps"] = max(1, round(stage.steps * part))
        changes[f"stages.{i}.step_epochs"] = stage.step_epochs * float(part)
    return recipe.override(changes)


def show(members: Sequence[Member], halving: int | None) -> int:
    """Print what would be trained, for --dry-run. Returns the exit code. Raises UserError."""
    left = len({each.choice for each in members})
    for rung in rungs(left, halving) if halving is not None else []:
        print(f"{rung.name}  {left} recipe{'s' if left > 1 else ''} at {'full length' if rung.part == 1 else f'{rung.part} of the length'}")
        left = rung.keep
    for each in members:
        print(each.path)
    return 0
