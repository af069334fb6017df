"""The help of the verbs that read a recipe: what most people need on one screen, and everything under `--help all`."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Backbone, Data, Distill, Recipe, Stage

SHOWN = "digits-resnet"
"""The recipe whose values are shown where none is named."""
SUMMARY = {
    "train": "Fine-tune a backbone by a recipe. The same command resumes the run.",
    "plan": "Show what a recipe would train, and how long it takes. Trains nothing.",
    "preview": "Draw what a recipe's network will see: samples by views, stage by stage.",
    "sweep": "Train every combination of some values of a recipe, each in a folder of its own.",
    "lr": "Look for a learning rate: one short run of a stage in which it rises.",
    "folds": "Cross-validate a recipe: every image is judged by a network that never saw it.",
}
USED = {
    "plan": (
        "folder", "max_device_batch", "compile", "workers", "views", "smoke", "cache", "cache_images", "cache_device_gb",
        "cache_memory_gb", "cache_disk_gb",
    ),
    "preview": ("smoke",),
}  # fmt: skip
"""The start-up flags that a verb uses. A verb that is not here uses all."""
_FEW = {
    "train": ("folder", "max_device_batch", "workers", "compile", "smoke"),
    "plan": ("max_device_batch", "workers", "compile", "cache", "smoke"),
    "preview": ("smoke",),
    "sweep": ("folder", "max_device_batch", "workers", "smoke"),
    "folds": ("folder", "max_device_batch", "workers", "smoke"),
}
_FLAG_HELP = {
    "folder": "the run folder (runs/NAME); auto takes the next free one, such as runs/NAME-2",
    "max_device_batch": "images that the device holds at once (128)",
    "workers": "processes that load images (by the cores)",
    "compile": "faster after a minute of compiling",
    "cache": "features that are computed once: auto, always or never (auto)",
    "smoke": "two steps a stage, as a test",
}
_OWN = {
    "preview": {"--out FILE": "the picture (preview.png)", "--rows N": "samples of each stage (8)"},
    "sweep": {
        "--over KEY=VALUES": "seed=0..4 or epochs=3,10; several: every combination",
        "--halving N": "rounds on shortened recipes; one in N goes on to the next",
        "--jobs N": "runs at a time (one a GPU, else one)",
        "--slurm ...": "last: submit an array; behind it options of `tltrain launch slurm`",
        "--dry-run": "show the runs and start nothing",
    },
    "lr": {
        "--stage NAME": "the stage to look at (the last)",
        "--steps N": "steps of the rise (100)",
        "--highest RATE": "learning rate of the last step (1)",
    },
    "folds": {
        "--k N": "parts of the images, each tested once (5)",
        "--repeats N": "how often the images are parted anew (1)",
        "--jobs N": "folds at a time (one a GPU, else one)",
        "--slurm ...": "last: submit an array; behind it options of `tltrain launch slurm`",
    },
}
EXAMPLES = {
    "train": ("folder-resnet50 photos --epochs 5", "folder-resnet50 photos --stages.head.lr 3e-4 --folder auto"),
    "plan": ("folder-resnet50 photos --size 160",),
    "preview": ("folder-resnet50 photos --rows 4", "digits-resnet --stages.all.augment strong"),
    "sweep": (
        "folder-resnet50 photos --over seed=0..2 --over epochs=5,15",
        "digits-resnet --over batch=16,32,64 --halving 3 --jobs 2",
    ),
    "lr": ("folder-resnet50 photos --stage head",),
    "folds": ("folder-resnet50 photos --k 5", "folder-resnet50 photos --k 5 --repeats 2 --slurm --time 1:00:00"),
}


def show(verb: str, name: str | None, recipe: Recipe, whole: bool) -> None:
    """Print the help of a verb, with the values of a recipe. name: the recipe as it was typed. whole: every option."""
    from rich.console import Console

    console = Console(highlight=False)
    say = lambda text, style=None: console.print(text, style=style, markup=False, soft_wrap=True)  # noqa: E731
    say(f"usage: tltrain {verb} RECIPE [DATA] [options]\n\n{SUMMARY.get(verb, '')}\n")
    say(f"RECIPE  a shipped name (`tltrain recipes`) or a .yaml file{f': {name}' if name else ''}")
    say("DATA    a folder with one subfolder a class, or a CSV file (the recipe's own)")
    for title, rows in (_everything if whole else _few)(verb, recipe).items():
        say(f"\n{title}", "bold")
        console.print(_table(rows))
    say("\nexamples", "bold")
    for example in EXAMPLES.get(verb, ()):
        say(f"  tltrain {verb} {example}")
    if not whole:
        say(f"\nin brackets: what holds in {recipe.name}\nall options: tltrain {verb} {f'{name} ' if name else ''}--help all")


def _table(rows: Mapping[str, str]) -> object:
    from tltrain.core.output.help import two_columns

    width = max(len(name) for name in rows)
    return two_columns({f"  {name:{width}}": text for name, text in rows.items()})


def _few(verb: str, recipe: Recipe) -> dict[str, dict[str, str]]:
    stages = recipe.stages
    lengths = ", ".join(f"{s.name} {f'{s.epochs:g}' if s.epochs else f'{s.steps} steps'}" for s in stages if s.epochs or s.steps)
    rates = ", ".join(f"{s.name} {s.lr:g}" for s in stages if s.lr is not None)
    learned = {
        "--data SOURCE": f"the data, as DATA ({recipe.data.source})",
        "--epochs N": f"passes over the images, of every stage ({lengths})",
        "--lr RATE": f"learning rate, of every stage ({rates})",
        "--stages.NAME.KEY": "a value of one stage, such as --stages." + f"{stages[-1].name}.lr",
        "--batch N": f"images a step ({recipe.batch})",
        "--size PIXELS": f"side of what the network sees ({recipe.data.size or 'as its weights'})",
        "--backbone.name NAME": f"the network ({recipe.backbone.name or 'as its weights'})",
        "--backbone.weights W": f"a run, a file or a name ({recipe.backbone.weights or 'random'})",
        "--seed N": f"order, new weights, dropout ({recipe.seed})",
    }
    if verb in ("sweep", "folds"):
        learned = {name: text for name, text in learned.items() if name not in ("--size PIXELS", "--backbone.weights W", "--seed N")}
    if verb == "preview":
        unseen = ("--epochs N", "--lr RATE", "--batch N", "--seed N")
        learned = {name: text for name, text in learned.items() if name not in unseen}
        learned["--stages.NAME.KEY"] = f"a value of one stage, such as --stages.{stages[-1].name}.augment"
    flags = {_flag(name): _FLAG_HELP[name] for name in _FEW.get(verb, _FEW["sweep"])}
    if verb in ("sweep", "folds"):
        flags["--folder PATH"] = f"the folder of the runs (runs/NAME-{verb})"
    own = {f"of {verb}": _OWN[verb]} if verb in _OWN else {}
    return {**own, "what is learned": learned, "how it runs": flags}


def own_flags(verb: str) -> tuple[str, ...]:
    """The flags that a verb has beside those of the recipe and of how it runs."""
    return tuple(flag.split()[0] for flag in _OWN.get(verb, ()))


def _flag(name: str) -> str:
    values = {"folder": " PATH", "max_device_batch": " N", "workers": " N", "cache": " WHEN"}
    return f"--{name.replace('_', '-')}{values.get(name, '')}"


def _everything(verb: str, recipe: Recipe) -> dict[str, dict[str, str]]:
    """Every option: those of stages once, with the values of each stage."""
    used, doc, hints = USED.get(verb), docstrings(RunFlags), get_type_hints(RunFlags)
    flags = {
        f"--{f.name.replace('_', '-')}": _described(doc[f.name], hints[f.name], [f.default])
        for f in fields(RunFlags)
        if used is None or f.name in used
    }
    distill = recipe.distill
    groups = {
        "short words": {
            "--data SOURCE": "data.source: folder:PATH, csv:FILE, a folder, a CSV file, ...",
            "--epochs N, --lr RATE": "of every stage; of one: --stages.NAME.epochs N",
            "--size PIXELS": "data.size, and data.resize in the same ratio",
        },
        "the recipe": _model(Recipe, "", recipe, skip=("data", "backbone", "distill", "stages")),
        "data": _model(Data, "data.", recipe.data),
        "backbone": _model(Backbone, "backbone.", recipe.backbone),
        "each stage, by its name or number": _model(Stage, "stages.NAME.", *recipe.stages),
        "distil": _model(Distill, "distill.", distill, skip=("teacher",)),
        "its teacher": _model(Backbone, "distill.teacher.", distill and distill.teacher),
        "how it runs": flags,
    }
    return ({f"of {verb}": _OWN[verb]} if verb in _OWN else {}) | groups


def _model(kind: type[BaseModel], prefix: str, *owners: BaseModel | None, skip: Iterable[str] = ()) -> dict[str, str]:
    rows = {}
    for name, field in kind.model_fields.items():
        if name not in skip:
            values = [getattr(owner, name) for owner in owners if owner is not None]
            rows[f"--{prefix}{name}"] = _described(field.description or "", field.annotation, values)
    return rows


def _described(text: str, kind: Any, values: list[Any]) -> str:
    """The text of an option with its choices and, in brackets, its values."""
    choices = _choices(kind)
    text = " ".join(text.split()) + (f" {' | '.join(map(str, choices))}" if choices else "")
    shown = ["null" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values]
    shown = shown[:1] if len(set(shown)) == 1 else shown
    return f"{text} ({', '.join(shown)})" if any(shown) else text


def _choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next(filter(None, map(_choices, get_args(kind))), ()) if isinstance(kind, types.UnionType) else ()


def print_fields(kind: Any, default: Any) -> None:
    """Print the fields of a dataclass as flags: the first sentence about each, and its value in `default` where that is set."""
    from rich.console import Console

    rows = {}
    for field, text in docstrings(kind).items():
        value = getattr(default, field)
        shown = f" ({value})" if value not in (None, (), False) else ""
        rows[f"--{field.replace('_', '-')}"] = text.partition(". ")[0].rstrip(".").partition(";")[0] + shown
    Console(highlight=False).print(_table(rows))


def docstrings(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            found[field.target.id] = " ".join(str(text).split())
    return found
