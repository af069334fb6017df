"""`tltrain.train`, `tltrain.chain` and `tltrain.probe`: the commands of these names, and a module of the caller's as a backbone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tltrain.analysis.probe.command import asked_source, candidates_of
from tltrain.analysis.probe.judge import Ask, ProbeRow
from tltrain.analysis.probe.judge import probe as judge_backbones
from tltrain.api.run import Run
from tltrain.core import recipe as recipes
from tltrain.core.errors import UserError
from tltrain.core.flags import RENAMED, RunFlags, say_renamed
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.heads.solve import Kind
from tltrain.models.families.own import OwnNetwork, give, own_network
from tltrain.runs import run_dir
from tltrain.runs.listing.folders import run_folder
from tltrain.training.run import train as train_run


def chain(
    module: nn.Module,
    *,
    size: int,
    cuts: Sequence[str] = (),
    head: str | None = None,
    name: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: int | None = None,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> OwnNetwork:
    """A module of your own as the backbone of `train`, cut into blocks that stages can freeze and stores can keep.

    module: maps normalised images (B, 3, size, size) to logits (B, classes). A copy of it is taken, weights included; a new head for the
        classes of the data takes the place of its own.
    size: side of its images, pixels. `data.size` of the recipe goes first.
    cuts: paths of submodules at each of which a block begins, such as ["layer3", "layer4"]: the names that `unfreeze` takes, beside head,
        all and stem for what lies before them. None: blocks are found by tracing. A module that cannot be traced runs whole, and the plan
        says so.
    head: path of its classifier, an nn.Linear; None takes the last one.
    name: what the recipe and the run folder call it; None takes the name of its class.
    mean, std: per channel, of images in [0, 1]; None takes ImageNet's. resize: shorter side before the crop; None takes size.
        interpolation: of the resizing, bilinear or bicubic.
    Raises UserError for a module that is no such classifier.

    To go on with a stopped run, or to load it, build the module again with the same weights (a seed, or a file) and give it again. A
    changed one, in its code, its layers or its weights, is refused.
    """
    return own_network(
        module, size=size, cuts=cuts, head=head, name=name, mean=mean, std=std, resize=resize, interpolation=interpolation
    )  # fmt: skip


def train(
    recipe: str | Path | Recipe | Mapping[str, Any],
    *,
    folder: str | Path | None = None,
    data: str | Path | Mapping[str, Any] | None = None,
    backbone: OwnNetwork | Mapping[str, Any] | None = None,
    stages: Sequence[Mapping[str, Any]] | None = None,
    batch: int | None = None,
    seed: int | None = None,
    workers: int | None = None,
    smoke: bool = False,
    **more: Any,
) -> Run:
    """Train a run in this process, or resume it, as `tltrain train` does.

    recipe: name of a shipped recipe, path of a recipe file, a Recipe, or a mapping of its values.
    folder: the run folder; None for runs/NAME. The same call again goes on where it stopped.
    data, backbone, stages, batch, seed: values of the recipe in place of its own; None keeps them. Mappings change the keys that they have:
        `data={"size": 64}`. data may be a folder of class folders, backbone a module of yours: `chain(module, size=224)`.
    workers: data workers; None for the processor cores, 0 for none. smoke: a test of two steps a stage.
    more: any other key of the recipe, also by path (`**{"stages.0.lr": 1e-3}`), and any other start-up flag (`compile=True`).
        `tltrain train --help all` lists both.
    Raises UserError for invalid arguments, if the run fails, and if a race of `unfreeze: auto` was stopped. A stopped run (Ctrl-C) is
    returned with its best weights so far; in a thread no signal is heard.
    """
    flags, changes = _flags_and_changes(more)
    own = backbone if isinstance(backbone, OwnNetwork) else None
    if own is not None:
        give(own)
        backbone = {"name": own.name, "weights": None, "mean": None, "std": None}
    if isinstance(data, str | Path):
        data = {"source": asked_source(str(data), Console(enabled=False))}
    named = {"data": data, "backbone": backbone, "stages": stages, "batch": batch, "seed": seed}
    start = RunFlags(folder=None if folder is None else Path(folder), workers=workers, smoke=smoke, **flags)
    learned = _opened(recipe).override({name: value for name, value in named.items() if value is not None} | changes)
    learned = learned.smoke() if smoke else learned
    ended = train_run(learned, start)
    if ended["outcome"] == "failed":
        raise UserError(f"the run failed: {ended['error']}")
    path = run_folder(learned, start)
    if ended["outcome"] == "stopped" and not run_dir.recipe_file(path).is_file():  # in a race of depths
        raise UserError("stopped before the run began; the same call goes on")
    return Run(path, own)


def probe(
    source: str | Path,
    backbones: Sequence[str] = (),
    *,
    cuts: Sequence[str] = ("head",),
    k: int | None = None,
    head: Kind = "ridge",
    size: int | None = None,
    seed: int = 0,
    everything: bool = False,
    label_separator: str | None = None,
    label_columns: Sequence[str] | None = None,
    workers: int | None = None,
) -> list[ProbeRow]:
    """Compare backbones on labelled images, as `tltrain probe` does. Returns rows, the best first.

    source: a folder of class folders, or a `data.source`. backbones: NAME, NAME=WEIGHTS or weights; none for those that are on this
    machine. cuts: blocks whose input is judged. k: folds; None for 10, and 5 from 2,000 images on. everything: the test split too.
    head: how it is worked out. size: of the images, pixels; None for each backbone's own. seed: of folds. workers: data workers.
    label_separator, label_columns: of several labels an image, as in a recipe's data; a row's accuracy is then mean average precision.
    A backbone that cannot be judged is named in a warning. Raises UserError where none can.
    """
    console = Console(enabled=False)
    candidates, problems, _ = candidates_of(backbones, console)
    ask = Ask(
        asked_source(str(source), console), tuple(cuts), k, head, size, seed=seed, everything=everything, label_separator=label_separator,
        label_columns=tuple(label_columns) if label_columns else None,
    )  # fmt: skip
    probed = judge_backbones(ask, candidates, RunFlags(workers=workers), console, problems)
    for name, why in probed.problems.items():
        warnings.warn(f"{name}: {why}", stacklevel=2)
    return list(probed.rows)


def _opened(recipe: str | Path | Recipe | Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return recipes.validate(dict(recipe), "recipe") if isinstance(recipe, Mapping) else recipes.load(str(recipe))


def _flags_and_changes(more: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(start-up flags, values of a recipe by path). Raises UserError for what is neither."""
    known = {f.name for f in fields(RunFlags)}
    for old in RENAMED.keys() & more.keys():
        say_renamed(old, RENAMED[old])
        more[RENAMED[old]] = more.pop(old)
    if unknown := sorted(name for name in more if name.split(".")[0] not in {*known, *Recipe.model_fields}):
        known_names = f"a key of a recipe ({', '.join(Recipe.model_fields)}) nor a flag ({', '.join(sorted(known))})"
        raise UserError(f"{unknown[0]!r} is neither {known_names}")
    flags = {name: value for name, value in more.items() if name in known}
    return flags, {name: value for name, value in more.items() if name not in known}
