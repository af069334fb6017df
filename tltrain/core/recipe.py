"""The recipe: its schema, reading and writing YAML, overrides, and the shipped recipes.

Every setting that changes the final weights is here and nowhere else. The distributed strategy and the precision belong to
``accelerate_configs/*.yaml``. Start-up flags (core/flags.py) say where a run is kept and how much one device can hold.
Does not import torch, so that it loads quickly on a login node.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from tltrain.core import errors, untrusted
from tltrain.core import files as regular
from tltrain.core.errors import UserError
from tltrain.core.registry import named
from tltrain.core.schema import taught
from tltrain.core.schema.backbone import Backbone as Backbone
from tltrain.core.schema.data import MOST_PIXELS as MOST_PIXELS
from tltrain.core.schema.data import Data as Data
from tltrain.core.schema.data import Model
from tltrain.core.schema.solved import check_solved

VERSION = 1
SMOKE_PER_CLASS = 4
"""Images of a class that a test run keeps, where a head is solved: that reads all of them."""
LOSS, DISTILL_LOSS = "cross_entropy", "kd"

Solve = Literal["ridge", "logistic", "nearest_mean"]
Augment = Literal["none", "light", "strong", "trivial", "rand"]


class Distill(Model):
    """A frozen teacher whose softened answers the student learns beside the labels, or whose features it learns before them."""

    teacher: Backbone
    """The teacher: a run folder as weights, or any backbone whose head knows this data's classes (with target features, any classes)."""
    target: taught.Target = "logits"
    """logits: beside the labels, in every stage; features (pooled) or tokens (the map before): in the first alone, by a linear map."""
    temperature: float = Field(taught.TEMPERATURE, gt=0)
    """Both logits are divided by T before the softmax; the KL term is multiplied by T squared (Hinton et al. 2015)."""
    weight: float = Field(0.9, ge=0, le=1)
    """Weight of the teacher's term in the loss; the labels' term has the rest; 1 with target features or tokens."""
    loss: Annotated[str, *named("distill_losses")] = DISTILL_LOSS
    """The teacher's term of the loss: kd, dist, dkd, or one of another package; with features or tokens cosine (usual) or smooth_l1."""
    logits: Literal["float16", "float32"] = "float16"
    """Precision that the teacher's logits or features are rounded to, cached or not."""
    top_k: int | None = Field(None, ge=1)
    """Classes whose logits are kept of each answer, the likeliest, all others as one class, cached or not; null keeps all; kd alone."""
    ensemble: tuple[str, ...] = ()
    """Run folders or weights of more teachers, such as the folds; the student learns the mean of their predictions and the teacher's."""
    unlabelled: str | None = None
    """Pictures without labels beside the labelled, for the teacher's term alone: folder:PATH, zip:FILE, tar:, csv: of paths, or others."""

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, raw: Any) -> Any:
        return taught.with_defaults(raw)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        taught.check(self)
        return self

    @property
    def teachers(self) -> tuple[Backbone, ...]:
        return (self.teacher, *(Backbone(weights=weights) for weights in self.ensemble))


class Stage(Model):
    """One stage: which blocks train, for how long, with which learning rates."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """A short name, for folders, plots and the log."""
    unfreeze: str
    """The first block that trains; all after it train too: a block (layer4.0), a group (layer4), head, all, or auto, which races depths."""
    epochs: float | None = Field(None, gt=0)
    """Length in passes over the training data; either this or steps."""
    steps: int | None = Field(None, ge=1)
    """Length in optimizer steps; either this or epochs."""
    solve: Solve | None = None
    """Work the head out from features in place of training it: ridge or logistic regression, or class means; needs unfreeze: head."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate of the head; each block below it has layer_decay times the rate of the one above; null only with solve."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate from each block to the one below it; 1 gives all blocks the same."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """SGD with momentum, or AdamW."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the parameters that weight_decay_on names."""
    weight_decay_on: Literal["matrices", "all"] = "matrices"
    """matrices leaves out norms, biases, class tokens and position embeddings; all is every parameter."""
    schedule: Literal["cosine", "step", "constant", "range"] = "cosine"
    """Learning rate over the stage: cosine to zero, times step_gamma every step_epochs, constant, or range: up to lr, for `tltrain lr`."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Part of the stage in which the learning rate rises linearly from near zero."""
    step_epochs: float = Field(30, gt=0)
    """For schedule step: epochs between two drops."""
    step_gamma: float = Field(0.1, gt=0, le=1)
    """For schedule step: the factor of each drop."""
    augment: Augment = "none"
    """none; light: crop with padding, flip; strong: resized crop, flip, turn, colours; trivial, rand: TrivialAugmentWide, RandAugment."""
    erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a rectangle of a view gets the view's mean colour (random erasing, Zhong et al. 2020)."""
    views: int | None = Field(None, ge=1)
    """Different views of each image, mixed or not: null a fresh one each epoch, 1 the evaluation view, k cycles through k."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup's Beta distribution (Zhang et al. 2018); 0 is off."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of cutmix's Beta distribution (Yun et al. 2019); 0 is off; with mixup each batch, or each of finite views, draws one."""
    norm_stats: Literal["frozen", "train"] = "frozen"
    """Whether BatchNorm of the blocks that train updates its running statistics."""
    loss: Annotated[str, *named("losses")] = LOSS
    """The loss of images and labels: cross_entropy, or one of another package."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the label that is spread evenly over all classes."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of the gradient over all parameters; null does not clip."""
    eval_epochs: float = Field(1.0, gt=0)
    """Epochs between two evaluations on val."""
    patience: int | None = Field(None, ge=1)
    """Evaluations without a better `select` or a lower val loss after which the stage ends early; null never."""
    trains: Literal["all", "biases_and_norms", "lora"] = "all"
    """What trains in these blocks below the head: every parameter, biases and norms (BitFit), or low-rank updates (LoRA)."""
    lora_rank: int = Field(8, ge=1)
    """For trains lora: rank of the update of each linear layer and 1x1 convolution."""
    lora_alpha: float = Field(16, gt=0)
    """For trains lora: the update is multiplied by lora_alpha / lora_rank."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, min(ema, (1 + step) / (10 + step)); null keeps none."""
    carry: Literal["best", "last", "ema", "blend"] = "best"
    """What the next stage starts from: the best so far, this stage's last, the averaged, or a blend of its start and end."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.solve is not None:
            check_solved(self, LOSS)
        elif (self.epochs is None) == (self.steps is None):
            raise ValueError("a stage needs exactly one of epochs and steps")
        elif self.lr is None:
            raise ValueError("a stage needs lr, its peak learning rate, such as 0.001; one with solve needs none")
        if (self.views == 1 or (self.solve and self.views is None)) and (self.augment != "none" or self.erasing):
            cannot = f"augment: {self.augment}" if self.augment != "none" else f"erasing: {self.erasing:g}"
            raise ValueError(
                f"views: 1 is the evaluation view, which {cannot} cannot change; leave that out, or set views to null or 2 and more"
            )
        return self


class Recipe(Model):
    """Every setting that changes what is learned. The same recipe is the same run on a laptop and on a cluster."""

    version: int = Field(VERSION, ge=1)
    """Version of this schema."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """A short name; the run folder is runs/NAME unless --folder says otherwise."""
    purpose: str = ""
    """What this recipe is for, in one line."""
    seed: int = 0
    """Seeds the sample order, mixup, dropout and new weights."""
    deterministic: bool = True
    """true: bit for bit the same on the same hardware, versions and number of processes; false: faster kernels."""
    batch: int = Field(ge=1, le=1_000_000)
    """Samples per optimizer step over all processes; micro-batches and accumulation follow from it."""
    select: Annotated[str, *named("metrics")] = "top1"
    """The val metric by which weights are best: top1, loss, f1_macro, ... (`tltrain schema`), or one of another package."""
    data: Data
    backbone: Backbone
    distill: Distill | None = None
    """A teacher, or null."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """The stages, in order: each starts from the weights of the one before."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [s.name for s in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names are {names}; each must be different")
        solved = [s.name for s in self.stages if s.solve is not None]
        kinds = [(s.name, s.solve) for s in self.stages if s.solve is not None]
        self.data.check_learned(kinds, taught.of_one_class(self.distill))
        if self.distill is not None and self.matches_features:
            taught.check_pretraining(self.stages, LOSS, self.distill.target)
        elif self.distill is not None and solved:
            raise ValueError(f"stage {solved[0]} has solve, which learns from labels alone, and distill names a teacher; leave one out")
        return self

    @property
    def matches_features(self) -> bool:
        """Whether the first stage learns a teacher's features, pooled or as a map, without labels, and the others labels alone."""
        return self.distill is not None and self.distill.target != "logits"

    @property
    def select_beside_loss(self) -> str:
        """The metric to show beside the loss, which has its own chart: `select`, or the usual one where that is the loss."""
        return ("map" if self.data.multilabel else "top1") if self.select == "loss" else self.select

    def smoke(self) -> Recipe:
        """A short test run of this recipe: two steps a stage, or a head solved on `SMOKE_PER_CLASS` images, and one batch of evaluation."""
        stages = tuple(s if s.solve else s.model_copy(update={"epochs": None, "steps": 2}) for s in self.stages)
        batch = min(self.batch, 16)
        few = min(self.data.per_class or SMOKE_PER_CLASS, SMOKE_PER_CLASS) if any(s.solve for s in self.stages) else self.data.per_class
        data = self.data.model_copy(update={"eval_limit": batch, "per_class": few})
        return self.model_copy(update={"batch": batch, "data": data, "stages": stages})

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """This recipe with other values. changes: dotted path to value, such as {"stages.0.lr": 1e-3}; a mapping changes the keys it has.

        The purpose of a shipped recipe names its backbone, so that another backbone has a purpose that names that.
        Raises UserError for a path that the recipe does not have, and for values that do not fit it.
        """
        values = self.model_dump(mode="json")
        for path, value in changes.items():
            *parents, last = path.split(".")
            at: Any = values
            try:
                for name in parents:
                    at = at[int(name)] if isinstance(at, list) else at[name]
                key: Any = int(last) if isinstance(at, list) else last
                old = at[key]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise UserError(f"the recipe has no {path!r}; `tltrain schema` lists what there is") from error
            at[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
        changed = validate(values, f"recipe {self.name} with these overrides")
        if not self.purpose or changed.purpose != self.purpose or changed.backbone.name == self.backbone.name:
            return changed
        return changed.model_copy(update={"purpose": f"{self.name} with {changed.backbone.name or changed.backbone.weights}"})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted path, such as stages.1.lr."""
        return untrusted.flatten(self.model_dump(mode="json"))

    def differences(self, other: Recipe) -> list[str]:
        """One line for each value that differs, such as ``stages.1.lr: 0.001 -> 0.0003``. Ignores name and purpose."""
        mine, theirs = (untrusted.flatten(r.model_dump(mode="json", exclude={"name", "purpose"})) for r in (self, other))
        keys = dict.fromkeys([*mine, *theirs])
        return [f"{k}: {mine.get(k, '(absent)')} -> {theirs.get(k, '(absent)')}" for k in keys if mine.get(k, ...) != theirs.get(k, ...)]


def parse(text: str, origin: str, kept: bool = False) -> Recipe:
    """A recipe from YAML text. origin: its name in messages. kept: of an existing run, whose packages may be gone. Raises UserError."""
    raw = untrusted.parse_yaml(text, origin)
    if not isinstance(raw, dict):
        raise UserError(f"{origin} holds {type(raw).__name__}, not a mapping of recipe keys; see `tltrain schema`")
    version = raw.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{origin} is a recipe of version {version}; this tltrain reads versions up to {VERSION}; upgrade tltrain")
    return validate(raw, origin, kept)


def validate(raw: dict[str, Any], origin: str, kept: bool = False) -> Recipe:
    """A recipe from plain values; `origin` and `kept` as in `parse`. Raises UserError with one line for each mistake."""
    try:
        return Recipe.model_validate(raw, context={"kept": kept})
    except ValidationError as error:
        raise UserError(errors.explain(error, origin, keys_at)) from error


def shipped() -> dict[str, Path]:
    """Name to file of each shipped recipe."""
    folder = Path(str(files("tltrain") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(name: str) -> Recipe:
    """A shipped recipe by name, or a recipe file by path. Raises UserError."""
    path = Path(name)
    known = shipped()
    if name in known:
        return parse(known[name].read_text(encoding="utf-8"), f"recipe {name}")
    if path.suffix not in (".yaml", ".yml"):
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "a recipe is a .yaml file or a shipped name (`tltrain recipes`)"
        raise UserError(f"no recipe is called {name!r}; {hint}")
    try:
        return parse(regular.read_text(path), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {name} cannot be read: {error}; see `tltrain recipes` for shipped ones") from error


def keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """The keys of a recipe below a place in it, such as ("stages", 0), as `errors.explain` asks for them."""
    nested: dict[str, type[BaseModel]] = {"data": Data, "backbone": Backbone, "distill": Distill, "teacher": Backbone, "stages": Stage}
    model: type[BaseModel] = Recipe
    for part in loc:
        model = nested[part] if isinstance(part, str) else model
    return list(model.model_fields)
