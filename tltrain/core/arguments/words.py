"""Short words that people type: a folder as the data, --data, --epochs, --lr, --size, and stages by their names."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tltrain.core import recipe as recipes
from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.paths import near
from tltrain.core.recipe import Recipe
from tltrain.core.schema.data import is_url, secret_in

SHORT = ("--data", "--epochs", "--lr", "--size")
_SWITCHES = {f"--{no}{field.name.replace('_', '-')}" for field in fields(RunFlags) if field.default is False for no in ("", "no-")}

_SEVERAL = (
    "--trackers", "--backbone.mean", "--backbone.std", "--distill.teacher.mean", "--distill.teacher.std", "--distill.ensemble",
    "--data.label_columns",
)  # fmt: skip
"""Flags that take every word behind them, or one word with commas in it."""


@dataclass(frozen=True)
class Words:
    """What was typed behind the recipe, made out."""

    changes: dict[str, Any]
    """What the short words change in the recipe: dotted path to value."""
    rest: list[str]
    """The other words, with stages by their numbers."""
    notes: list[str]
    """What was decided, for the user."""


def source_of(text: str) -> str | None:
    """The data source that a person means: folder:photos for a folder, csv:a.csv for a file, and a source as it is. None: it is none."""
    kind, _, argument = text.partition(":")
    sources = registry.names("sources")
    suffix = Path(text).suffix.lower().lstrip(".")
    if is_url(text) and kind not in sources:
        _check_url(text, "the data")
        meant = f"did you mean {suffix}:{text}?" if suffix in sources else "say what it is, such as zip:https://host/x.zip"
        raise UserError(f"{text} is a URL, and no data source; {meant}")
    if is_url(argument):
        _check_url(argument, kind)
    if kind in sources and (":" in text or not os.path.isdir(text)):
        return text
    if os.path.isdir(text):  # of a name that is too long it says no
        return f"folder:{text}"
    return f"{suffix}:{text}" if suffix in sources and os.path.isfile(text) else None


def _check_url(url: str, where: str) -> None:
    """Raise UserError for a URL with a secret, which is not repeated, or without a host that can be read."""
    try:
        what = secret_in(url)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if what:
        raise UserError(f"{where}: the URL holds a secret ({what}), which runs would write down; docs/data.md says where it belongs")


def is_data(word: str) -> bool:
    """Whether a word that stands in a recipe's place is a folder of images or a data source."""
    named = word in recipes.shipped() or Path(word).suffix in (".yaml", ".yml") or os.path.isfile(Path(word) / "recipe.yaml")
    return not named and source_of(word) is not None


def load(verb: str, name: str) -> Recipe:
    """The recipe of this name. Raises UserError; where the word is a folder or a data source, with the command that was likely meant."""
    path = Path(name)
    if os.path.isfile(path / "recipe.yaml"):
        raise UserError(f"{name} is a run folder; this goes on with it:\n  tltrain {verb} {path / 'recipe.yaml'} --folder {name}")
    if is_data(name):
        raise UserError(f"{name} is data, and the recipe comes before it; you probably mean:\n  {usual(verb, name)}")
    return recipes.load(name)


def usual(verb: str, data: str = "photos") -> str:
    """A command that works, to show in help and messages. data: a folder of images."""
    data = data.removeprefix("folder:")
    return f"tltrain {verb} folder-resnet50 {data if source_of(data) or data == 'photos' else f'--data {data}'}"


def check_for_fit(verb: str, argv: Sequence[str]) -> None:
    """Check that no flag behind data that stands in a recipe's place asks for a recipe. Raises UserError with the command that has one."""
    known = {"seed", "folder", "workers"}  # `tltrain fit` has them too
    own = {*Recipe.model_fields, *(field.name for field in fields(RunFlags))} - known
    for word in argv[1:]:
        name = word.partition("=")[0]
        if word.startswith("--") and (name in SHORT or "." in name or name[2:].replace("-", "_") in own):
            meant = f"{usual(verb, argv[0])} {shlex.join(argv[1:])}"
            raise UserError(f"{argv[0]} is data, and {name} needs a recipe before it; you probably mean:\n  {meant}")


def understood(recipe: Recipe, argv: Sequence[str]) -> Words:
    """Make out the words behind the recipe. Raises UserError."""
    argv, data = list(argv), None
    if argv and not argv[0].startswith("-"):
        data = argv.pop(0)
    elif len(argv) > 1 and _stands_alone(argv) and source_of(argv[-1]) is not None:
        data = argv.pop()
    short, rest = _taken(recipe, argv)
    if data is not None and "--data" in short:
        raise UserError(f"the data is {data} and --data {short['--data']}; give one of them")
    if data is not None:
        short = {"--data": data, **short}
    words = Words({}, _at_commas(rest), [])
    for name, value in short.items():
        _apply(words, recipe, name, value)
    return words


def _stands_alone(argv: Sequence[str]) -> bool:
    """Whether the last word is no flag, and no value of the flag before it, of which some take several."""
    flags = [i for i, word in enumerate(argv) if word.startswith("--")]
    if not flags or flags[-1] == len(argv) - 1:
        return not flags
    name, equals, _ = argv[flags[-1]].partition("=")
    values, behind = 0 if equals or name in _SWITCHES else 1, argv[flags[-1] + 1 :]
    if _takes_several(name) and not equals:  # one word with commas is the whole list
        return len(behind) == 2 and _is_list(behind[0]) and is_data(behind[1])
    return len(behind) > values


def _takes_several(flag: str) -> bool:
    return flag.replace("-", "_") in {known.replace("-", "_") for known in _SEVERAL}


def _at_commas(argv: Sequence[str]) -> list[str]:
    """One word behind a flag of several values as those that commas part: --backbone.mean 0.5,0.5,0.5. Several words stay as they are."""
    parted: list[str] = []
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        alone = i + 1 == len(argv) or argv[i + 1].startswith("--")
        if equals and _takes_several(name) and _is_list(value):
            parted += [name, *_parts(value)]
        elif i and _takes_several(argv[i - 1]) and alone and _is_list(word):
            parted += _parts(word)
        else:
            parted.append(word)
    return parted


def _is_list(word: str) -> bool:
    """Whether commas part several values here, and are not in the name of a file or of a run's folder."""
    return "," in word and not os.path.exists(word) and not os.path.exists(word.removeprefix("run:"))


def _parts(word: str) -> list[str]:
    return [part.strip() for part in word.split(",")]


def _taken(recipe: Recipe, argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(short words with their values, the other words). Raises UserError for a short word without a value, or twice."""
    short: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in SHORT:
            rest.append(numbered(recipe, name) + equals + value)
            continue
        value = value if equals else next(words, "--")
        if value.startswith("--"):
            raise UserError(f"{name} needs a value behind it, such as {name} {_EXAMPLES[name]}")
        if name in short:
            raise UserError(f"{name} stands twice, with {short[name]} and {value}; leave one out")
        short[name] = value
    return short, rest


_EXAMPLES = {"--data": "folder:photos", "--epochs": "3", "--lr": "1e-3", "--size": "224"}


def numbered(recipe: Recipe, flag: str) -> str:
    """--stages.head.lr as --stages.0.lr. Raises UserError for a stage that the recipe does not have."""
    first, *others = flag.split(".")
    known = [stage.name for stage in recipe.stages]
    if first != "--stages" or len(others) < 2 or others[0].isdigit():
        return flag
    name, *keys = others
    if name not in known:
        raise UserError(f"{flag} names no stage of {recipe.name}; its stages are {', '.join(known)}")
    return ".".join(["--stages", str(known.index(name)), *keys])


def _apply(words: Words, recipe: Recipe, name: str, value: str) -> None:
    if name == "--data":
        source = source_of(value)
        if source is None:
            sources = ", ".join(registry.names("sources"))
            hint = near(value) or f"; sources: {sources}"
            raise UserError(f"the data is {value!r}, which is no folder, no CSV file and no source here{hint}")
        words.changes["data.source"] = source
        if source != value:
            words.notes.append(f"the data is {source}")
        if source != recipe.data.source and (kept := _kept(recipe)):
            words.notes.append(f"{recipe.name} was made for {recipe.data.source}, and what it says of data holds for {source} too: {kept}")
        return
    number = _number(name, value)
    if name == "--size":
        words.changes.update(_sized(recipe, int(number)))
    else:
        _of_all_stages(words, recipe, name.removeprefix("--"), number)


def _kept(recipe: Recipe) -> str:
    """The settings of a recipe's data that are no defaults, as flags that change them. Those of size go with the network."""
    fields = type(recipe.data).model_fields.items()
    said = {name: getattr(recipe.data, name) for name, field in fields if getattr(recipe.data, name) != field.default}
    return ", ".join(f"--data.{name} {value}" for name, value in said.items() if name not in ("source", "size", "resize"))


def _number(name: str, value: str) -> float:
    kind: type[int] | type[float] = int if name == "--size" else float
    try:
        number = kind(value)
    except ValueError:
        what = "a whole number of pixels" if kind is int else "a number"
        raise UserError(f"{name} is {value!r}; it must be {what}, such as {name} {_EXAMPLES[name]}") from None
    if not 0 < number < float("inf"):
        raise UserError(f"{name} is {value}; it must be above 0")
    return number


def _sized(recipe: Recipe, size: int) -> dict[str, int | None]:
    """data.size, and data.resize in the recipe's own ratio to it."""
    old = recipe.data
    ratio = None if old.size is None or old.resize is None else old.resize / old.size
    return {"data.size": size, "data.resize": None if ratio is None else round(ratio * size)}


def _of_all_stages(words: Words, recipe: Recipe, key: str, value: float) -> None:
    """--epochs or --lr, of every stage that has such a thing."""
    was = {"lr": lambda s: s.lr, "epochs": lambda s: s.epochs or s.steps}[key]
    units = {"lr": lambda s: f"{s.lr:g}", "epochs": lambda s: f"{s.epochs:g}" if s.epochs else f"{s.steps} steps"}[key]
    having = [(i, stage) for i, stage in enumerate(recipe.stages) if was(stage) is not None]
    if not having:
        raise UserError(f"--{key} is {value:g}, and no stage of {recipe.name} has {key}; leave it out")
    for i, _ in having:
        words.changes[f"stages.{i}.{key}"] = value
        if key == "epochs":
            words.changes[f"stages.{i}.steps"] = None
    if len(having) > 1:
        named = ", ".join(f"{stage.name} (was {units(stage)})" for _, stage in having)
        words.notes.append(f"--{key} {value:g} is of every stage: {named}; of one: --stages.{having[-1][1].name}.{key} {value:g}")
