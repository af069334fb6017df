"""Which evaluation of a head stage is the best one on test: by val top-1, by val loss, or simply the last. Over many splits of one set."""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.demo_gain import bootstrap, cpu_name, interval
from tltrain.analysis.features import EVERY, FeatureBank
from tltrain.commands import demo
from tltrain.core.arguments import parsing
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits, open_images
from tltrain.data.sampler import SampleStream
from tltrain.training.optim import make_optimizer, set_lr


@dataclass(frozen=True)
class Evaluation:
    """Figures after some steps of the stage."""

    val_top1: float
    val_loss: float
    test_top1: float


RULES: dict[str, Callable[[Evaluation], tuple[float, ...]]] = {
    "select: top1, of equal ones the lower loss": lambda at: (at.val_top1, -at.val_loss),
    "select: top1, of equal ones the first": lambda at: (at.val_top1,),
    "select: loss": lambda at: (-at.val_loss,),
    "the last weights": lambda at: (0.0,),
}
"""What is largest for the weights that a rule takes. Of equal evaluations the first counts, but for the last weights."""
LAST = "the last weights"


def main(words: Sequence[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("recipe", help="a shipped name or a .yaml file, whose first stage trains the head on view 0")
    parser.add_argument("--splits", type=int, default=30, help="data seeds 0 to N-1, each with a split of its own (default: 30)")
    given, overrides = parser.parse_known_args(words)
    if given.splits < 2:
        parser.error(f"--splits is {given.splits}; a spread needs at least 2")
    try:
        recipe, _ = parsing.parse("train", [given.recipe, *overrides])
        with demo.one_thread():
            found, sizes = over_splits(recipe, given.splits)
    except UserError as error:
        parser.error(str(error))
    print(show(found))
    print(f"\n{given.splits} splits, {sizes}; {cpu_name()}, one thread of {os.cpu_count()} cores, torch {torch.__version__}")
    return found


def over_splits(recipe: Recipe, num_splits: int) -> tuple[dict[str, list[float]], str]:
    """(test top-1 of each rule, one value a split; the sizes of the splits). Raises UserError."""
    if recipe.stages[0].unfreeze != "head" or recipe.stages[0].views != 1:
        raise UserError(f"the first stage of {recipe.name} is not the head alone on view 0; set its unfreeze: head and views: 1")
    whole = recipe.override({"data": {"val_fraction": 0, "test_fraction": 0, "per_class": None}})
    with FeatureBank.open(whole, RunFlags(folder=Path("runs/selection")), Console(False), which=EVERY) as bank:
        features_ND, place_of = bank.features(), {name: i for i, name in enumerate(bank.ids)}
    found: dict[str, list[float]] = {rule: [] for rule in RULES}
    for seed in range(num_splits):
        images = open_images(recipe.data.model_copy(update={"seed": seed}))
        made = recipe.model_copy(update={"seed": seed})
        evaluations = head_stage(made, images, {split: features_ND[[place_of[i] for i in ids]] for split, ids in _ids(images).items()})
        for rule, key in RULES.items():
            taken = evaluations[-1] if rule == LAST else max(evaluations, key=key)
            found[rule].append(taken.test_top1)
    return found, ", ".join(f"{len(ids)} {name}" for name, ids in _ids(images).items())


def head_stage(recipe: Recipe, images: DataSplits, features: dict[str, Tensor]) -> list[Evaluation]:
    """Train the head as the recipe's first stage does, on features (N, D) by split, and evaluate it as often. From a head of zeros."""
    assert images.val is not None
    assert images.test is not None
    stage = _plan(recipe, len(images.train))
    spec, label_of = stage.spec, {split.name: torch.from_numpy(split.labels) for split in (images.train, images.val, images.test)}
    head = nn.Linear(features["train"].shape[1], len(images.classes))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [
        {"params": [p], "lr": spec.lr, "peak_lr": spec.lr, "weight_decay": spec.weight_decay * (p.ndim > 1)} for p in head.parameters()
    ]
    optimizer = make_optimizer(groups, spec)
    stream = SampleStream(recipe.seed, 0, len(images.train), recipe.batch, 1, 0)
    evaluations = [_evaluated(head, features, label_of)]
    for step in range(stage.num_steps):
        set_lr(optimizer, stage.lr_factor(step))
        at_B = torch.tensor([item.position for item in stream.step(step)])
        loss = F.cross_entropy(head(features["train"][at_B]), label_of["train"][at_B], label_smoothing=spec.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if stage.evaluates_after(step + 1):
            evaluations.append(_evaluated(head, features, label_of))
    return evaluations


def _plan(recipe: Recipe, num_train: int) -> StagePlan:
    """The first stage, as long as in a run. Of the network only its head matters."""
    spec = recipe.stages[0]
    num_steps = spec.steps or math.ceil((spec.epochs or 0) * num_train / recipe.batch - 1e-9)
    return StagePlan(0, spec, (1.0,), num_steps, num_train, recipe.batch, 0, 0)


def _evaluated(head: nn.Module, features: dict[str, Tensor], label_of: dict[str, Tensor]) -> Evaluation:
    with torch.no_grad():
        logits = {name: head(features[name]) for name in ("val", "test")}
    top1 = {name: float((logits[name].argmax(1) == label_of[name]).double().mean()) for name in logits}
    return Evaluation(top1["val"], float(F.cross_entropy(logits["val"], label_of["val"])), top1["test"])


def _ids(images: DataSplits) -> dict[str, tuple[str, ...]]:
    return {split.name: tuple(split.ids) for split in (images.train, images.val, images.test) if split is not None}


def show(found: dict[str, list[float]]) -> str:
    """A Markdown table: percent of the test images, differences paired by split."""
    (first, base), *_ = found.items()
    lines = [f"| weights | n | test top-1, mean | sd | against {first} (95 % interval) |", "|--|--:|--:|--:|--:|"]
    for rule, top1 in found.items():
        difference = "" if top1 is base else interval(bootstrap([a - b for a, b in zip(top1, base, strict=True)]))
        lines.append(f"| {rule} | {len(top1)} | {100 * statistics.mean(top1):.1f} | {100 * statistics.stdev(top1):.1f} | {difference} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
