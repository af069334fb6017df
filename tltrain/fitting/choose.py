"""Chooses a recipe: a pure function of the facts, of what a probe found, and of what this machine can do in the time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tltrain.core.output.console import duration
from tltrain.core.recipe import Recipe, validate
from tltrain.fitting.facts import UNEVEN, Facts
from tltrain.fitting.speeds import Cut, Speeds

EPOCHS = ((2_000, 20.0), (20_000, 10.0), (10**12, 5.0))
"""(fewer training images than this, passes over them): small sets are seen more often."""
LEAST_STEPS = 200
"""Steps that a stage takes at least: fewer leave it half trained."""
VIEWS = 4
"""Stored views of each image where its frozen features are computed once."""
MANY = 5_000
"""Training images from which views are fresh in each epoch: storing them costs more than it saves."""
JUDGES = 500
"""Val images from which val alone can tell whether deeper training paid."""
WRITTEN = ("digits", "printed")
"""Sources of characters."""
LEAST_RACED = 50
"""Training images below which nothing deeper than the head is tried."""
FOLDS = 3
"""Of the race between depths, where val is too small to judge."""


@dataclass(frozen=True)
class Backbone:
    """The backbone that won the probe, and what the probe says of it."""

    name: str | None
    weights: str | None
    head: str
    """How its head is worked out best: ridge or logistic."""
    why: str
    """Why this backbone."""
    why_head: str


@dataclass(frozen=True)
class Depth:
    """A candidate: the head alone, or training from a cut on."""

    cut: Cut | None
    steps: int = 0
    seconds: float = 0.0
    """Estimated time of its training on all training images."""

    @property
    def name(self) -> str:
        return "head" if self.cut is None else self.cut.unfreeze


@dataclass(frozen=True)
class Draft:
    """A recipe, and why each line is as it is."""

    values: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    """Dotted path to the reason, such as stages.1.lr."""

    @property
    def recipe(self) -> Recipe:
        return validate(self.values, "the chosen recipe")


def batch_of(facts: Facts) -> int:
    """Images of one step."""
    return 32 if facts.train < 2_000 else 64 if facts.train < 20_000 else 256


def depths(facts: Facts, speeds: Speeds, left_s: float) -> tuple[list[Depth], str]:
    """The depths that can be tried in `left_s` seconds, the head alone first, and a sentence on those that cannot.

    Where val is too small to judge, each is also trained on FOLDS folds, beside the training that is kept.
    """
    if facts.train < LEAST_RACED:
        return [Depth(None)], f"{facts.train:,} training images are too few to tell depths apart"
    batch, judged = batch_of(facts), facts.val >= JUDGES
    epochs = next(passes for most, passes in EPOCHS if facts.train < most)
    steps = max(LEAST_STEPS, math.ceil(epochs * facts.train / batch))
    tried, out_of_reach, spent_s = [Depth(None)], [], 0.0
    for cut in speeds.cuts:
        seconds = cost_s(facts, speeds, cut, steps, batch)
        times = 1.0 if judged else 1.0 + FOLDS * 2 / 3  # a fold trains on two thirds of the images
        others_s = 0.0 if judged else spent_s
        if others_s + times * seconds > left_s:
            out_of_reach.append(f"{cut.unfreeze} ({duration(times * seconds)})")
            continue
        tried.append(Depth(cut, steps, seconds))
        spent_s += (times - 1) * seconds
        if judged:
            break  # val decides between the head and one depth: the shallowest that fits
    said = f"out of reach in the time left, {duration(left_s)}: {', '.join(out_of_reach)}; more --minutes try them" if out_of_reach else ""
    return tried, said


def cost_s(facts: Facts, speeds: Speeds, cut: Cut, steps: int, batch: int) -> float:
    """Estimated seconds of a stage from a cut on."""
    views = _views(facts)
    rows = facts.train * (VIEWS if views is not None else 0)
    frozen_s = speeds.fill_s(cut, rows) if rows else speeds.fill_s(cut, steps * batch)
    return frozen_s + steps * speeds.step_s(cut, batch)


def draft(facts: Facts, backbone: Backbone, speeds: Speeds, depth: Depth, name: str, why_depth: str, seed: int = 0) -> Draft:
    """The recipe of a depth. why_depth: why it is this one."""
    reasons = {
        "backbone.name": backbone.why,
        "batch": f"{facts.train:,} training images: small enough for many steps an epoch, large enough for the device to be busy",
        "stages.0.solve": backbone.why_head,
        "stages.0.views": "the evaluation view: its features are those of the probe, and are stored already",
    }
    values: dict[str, Any] = {
        "name": name,
        "purpose": f"Chosen by tltrain fit for {facts.source}"[:200],
        "seed": seed,
        "batch": batch_of(facts),
        "data": {"source": facts.source},
        "backbone": {"name": backbone.name, "weights": backbone.weights},
        "stages": [{"name": "head", "unfreeze": "head", "solve": backbone.head, "views": 1, "carry": "last"}],
    }
    if facts.source in WRITTEN:
        values["data"]["flip"] = False
        reasons["data.flip"] = "mirrored characters are others"
    if facts.ratio > UNEVEN:
        values["data"]["balance"] = "weights"
        reasons["data.balance"] = f"{facts.largest} has {facts.ratio:.1f} times as many images as {facts.smallest}, and would drown it out"
    if depth.cut is not None:
        values["stages"].append(_deep(facts, speeds, depth))
        reasons |= _deep_reasons(facts, speeds, depth, why_depth)
    else:
        reasons["stages.0.unfreeze"] = why_depth
    return Draft(values, reasons)


def _views(facts: Facts) -> int | None:
    return VIEWS if facts.train < MANY else None


def _deep(facts: Facts, speeds: Speeds, depth: Depth) -> dict[str, Any]:
    assert depth.cut is not None
    return {
        "name": "deep",
        "unfreeze": depth.cut.unfreeze,
        "steps": depth.steps,
        "lr": 1e-4 if speeds.transformer else 3e-4,
        "layer_decay": 0.75 if speeds.transformer else 0.8,
        "weight_decay": 0.05,
        "warmup": 0.1,
        "augment": "light" if facts.train < MANY else "trivial",
        "views": _views(facts),
        "label_smoothing": 0.1,
        "carry": "best" if facts.val >= JUDGES else "last",
    }


def _deep_reasons(facts: Facts, speeds: Speeds, depth: Depth, why_depth: str) -> dict[str, str]:
    epochs = depth.steps * batch_of(facts) / facts.train
    kind = "transformers" if speeds.transformer else "convolutions"
    at = "stages.1"
    reasons = {
        f"{at}.unfreeze": why_depth,
        f"{at}.steps": f"{epochs:.0f} epochs, and {LEAST_STEPS} steps at least; about {duration(depth.seconds)} on this machine",
        f"{at}.lr": f"usual for AdamW on pretrained {kind}; not searched (tltrain lr looks)",
        f"{at}.layer_decay": "blocks near the images know what all images share, and move less (BEiT)",
        f"{at}.augment": "pictures are few: mild changes, stored" if facts.train < MANY else "many pictures: fresh views each epoch",
    }
    if facts.train < MANY:
        reasons[f"{at}.views"] = f"what lies below {depth.name} is computed once for each of {VIEWS} views of an image"
    if facts.val >= JUDGES:
        reasons[f"{at}.carry"] = f"{facts.val:,} val images can tell whether this stage paid; if not, the solved head stays"
    else:
        reasons[f"{at}.carry"] = f"{facts.val:,} val images are too few to choose weights by; the folds of the race chose"
    return reasons


def shallowest(order: Sequence[str], accuracy: dict[str, float], low: dict[str, float]) -> str:
    """The shallowest depth that the best cannot be told from.

    order: the names, shallow first. accuracy: of each. low: the lower end of the interval of the best's lead over each, paired.
    """
    best = max(order, key=lambda name: (accuracy[name], -order.index(name)))
    return next(name for name in order if name == best or low[name] <= 0)
