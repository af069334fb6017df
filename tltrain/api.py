"""The Python interface: `tltrain.load` opens a run, `tltrain.train` trains one, `tltrain.probe` compares backbones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image

from tltrain.analysis.probe.command import asked_source, candidates_of
from tltrain.analysis.probe.judge import Ask, ProbeRow
from tltrain.analysis.probe.judge import probe as judge_backbones
from tltrain.core import recipe as recipes
from tltrain.core.errors import UserError
from tltrain.core.flags import RENAMED, RunFlags, say_renamed
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.evaluation.predict import BATCH, Picture, Prediction, predict
from tltrain.evaluation.trained import TrainedModel, load_trained
from tltrain.heads.solve import Kind
from tltrain.models.chain import Chain
from tltrain.runs import run_dir
from tltrain.runs.listing.folders import run_folder
from tltrain.runs.metrics_log import read_rows
from tltrain.training.run import train as train_run


class Run:
    """A run folder. Files are read when first needed."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError if `path` is not a run folder."""
        self.path = Path(path)
        self.recipe: Recipe = run_dir.read_recipe(self.path)
        """The recipe of the run."""

    @overload  # a string is a sequence of strings too; here it is one file
    def predict(self, pictures: Picture, *, top: int = 5, batch: int = BATCH) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, pictures: Sequence[Picture], *, top: int = 5, batch: int = BATCH) -> list[Prediction]: ...
    def predict(self, pictures: Picture | Sequence[Picture], *, top: int = 5, batch: int = BATCH) -> Prediction | list[Prediction]:
        """Predict the class of one picture, or of each picture of a list.

        pictures: file paths, PIL images, or tensors (3, H, W), uint8 or float in [0, 1]. Each is resized and cropped as in the
        evaluation of the run. (Pass a batch that is already preprocessed to `model`.)
        top: number of classes listed in each prediction. batch: images in one forward pass.
        Returns predictions with `label`, `confidence` (calibrated) and `top`. For a file that cannot be read, `problem` is set instead.
        Raises UserError if the run has no weights yet, or if a tensor is not an image.
        """
        if isinstance(pictures, str | Path | Image.Image | torch.Tensor):
            return next(predict(self._trained, [pictures], top, batch))
        return list(predict(self._trained, pictures, top, batch))

    @property
    def model(self) -> Chain:
        """The network as a torch module on the CPU, frozen and in eval mode.

        It maps images (B, 3, size, size), uint8 or float in [0, 1], to logits (B, classes). Normalisation is included. The softmax of the
        logits is calibrated. Raises UserError.
        """
        return self._trained.chain

    @property
    def classes(self) -> tuple[str, ...]:
        """The class name of each logit. Raises UserError."""
        return self._trained.classes

    @property
    def metrics(self) -> dict[str, Any]:
        """The test metrics: top1, f1_macro, ece, per_class, confusion, ... Empty before the test."""
        return run_dir.test_metrics(self.path) or {}

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every row that the run logged, in order: {"kind": "train", "stage": "head", "step": 1, "loss": ...}, ..."""
        return read_rows(self.path)

    @property
    def outcome(self) -> dict[str, Any]:
        """How the run ended: {"outcome": "finished", ...}. Empty if it has not ended."""
        return run_dir.outcome(self.path)

    @cached_property
    def _trained(self) -> TrainedModel:
        return load_trained(self.path)

    def __repr__(self) -> str:
        return f"tltrain.Run({str(self.path)!r}, {self.outcome.get('outcome', 'not finished')})"


def load(path: str | Path) -> Run:
    """Open a run folder. Raises UserError if it is not a run folder."""
    return Run(path)


def train(recipe: str | Path | Recipe | Mapping[str, Any], **overrides: Any) -> Run:
    """Train a run in this process, or resume it, as `tltrain train` does.

    recipe: name of a shipped recipe, path of a recipe file, a Recipe, or a mapping of its values.
    overrides: values of the recipe, nested (`data={"size": 64}`) or by path (`**{"stages.0.lr": 1e-3}`), and start-up flags
    (`folder="runs/a"`, `workers=2`). `tltrain train --help` lists both.
    Raises UserError for invalid arguments, or if the run fails. A stopped run (Ctrl-C) is returned with its best weights so far. Calling
    `train` again with the same arguments resumes it.
    """
    flags = {f.name for f in fields(RunFlags)}
    for old in RENAMED.keys() & overrides.keys():
        say_renamed(old, RENAMED[old])
        overrides[RENAMED[old]] = overrides.pop(old)
    run_flags = {name: value for name, value in overrides.items() if name in flags}
    if run_flags.get("folder") is not None:
        run_flags["folder"] = Path(run_flags["folder"])
    if unknown := sorted(name for name in overrides if name.split(".")[0] not in {*flags, *Recipe.model_fields}):
        known = f"a key of a recipe ({', '.join(Recipe.model_fields)}) nor a flag ({', '.join(sorted(flags))})"
        raise UserError(f"{unknown[0]!r} is neither {known}")
    start = RunFlags(**run_flags)
    learned = _opened(recipe).override({name: value for name, value in overrides.items() if name not in flags})
    if start.smoke:
        learned = learned.smoke()
    ended = train_run(learned, start)
    if ended["outcome"] == "failed":
        raise UserError(f"the run failed: {ended['error']}")
    return Run(run_folder(learned, start))


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
    workers: int | None = None,
) -> list[ProbeRow]:
    """Compare backbones on labelled images, as `tltrain probe` does. Returns rows, the best first.

    source: a folder of class folders, or a `data.source`. backbones: NAME, NAME=WEIGHTS or weights; none for those that are on this
    machine. cuts: blocks whose input is judged. k: folds; None for 10, and 5 from 2,000 images on. everything: the test split too.
    A backbone that cannot be judged is named in a warning. Raises UserError where none can.
    """
    console = Console(enabled=False)
    candidates, problems, _ = candidates_of(backbones, console)
    ask = Ask(asked_source(str(source), console), tuple(cuts), k, head, size, seed, everything)
    probed = judge_backbones(ask, candidates, RunFlags(workers=workers), console, problems)
    for name, why in probed.problems.items():
        warnings.warn(f"{name}: {why}", stacklevel=2)
    return list(probed.rows)


def _opened(recipe: str | Path | Recipe | Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return recipes.validate(dict(recipe), "recipe") if isinstance(recipe, Mapping) else recipes.load(str(recipe))
