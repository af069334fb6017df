"""Chooses a recipe: a pure function of facts about the data, probe results, and the speed of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tltrain.core.output.console import duration
from tltrain.core.recipe import Recipe, validate
from tltrain.fitting.facts import Facts
from tltrain.fitting.lr_range import Found
from tltrain.training.depths.judge import HEAD

EPOCHS = ((2_000, 20.0), (20_000, 10.0), (10**12, 5.0))
"""(fewer training images than this, passes over them): small sets are seen more often."""
LEAST_STEPS = 200
"""Steps that a stage takes at least: fewer leave it half trained."""
VIEWS = 4
"""Stored views of each image where its frozen features are computed once."""
MANY = 5_000
"""Training images from which views are fresh in each epoch: storing them costs more than it saves."""
JUDGES = 500
"""From this many val images on, val alone shows whether deeper training paid."""
FEW_OF_EACH = 20
"""Training images of a class, on average, below which ridge learns from val too: it gains the more, the fewer there are, and its
probabilities are no worse, since it scales them by images that it leaves out (docs/evidence.md, by benchmarks.val_images)."""
WRITTEN = ("digits", "printed")
"""Sources of written characters, whose mirror images have other meanings."""
LEAST_RACED = 50
"""Training images below which nothing deeper than the head is tried."""
FOLDS = 3
"""Folds of the race between depths, which judges where val is too small."""
LR_STEPS = 60
"""Steps of a depth's learning-rate range test."""
WARMUP = 0.1
"""Share of the steps."""
USUAL_LR = {True: 1e-4, False: 3e-4}
"""For AdamW on pretrained transformers, and on other networks."""
FAR = 3.0
"""Times that the range test may move a learning rate from the usual one: it judges the first steps alone."""


@dataclass(frozen=True)
class Chosen:
    """The network, its head and its images, and why."""

    name: str | None
    weights: str | None
    head: str
    """How the head is worked out best: ridge or logistic."""
    transformer: bool
    """Whether it is not convolutional. Such networks need a smaller learning rate."""
    device: str
    """The device it was timed on."""
    reasons: dict[str, str]
    """Reasons of the choices so far, by dotted path in the recipe."""
    size: int | None = None
    """Side of the images, pixels. None: that of the weights."""
    resize: int | None = None
    """Shorter side before the crop, pixels. None: the weights' own ratio of it to the size."""
    per_class: int | None = None
    """Training images of each class at most, where the time does not allow all."""
    balanced: bool = False
    """Whether classes are weighted: it was tried, and paid."""


@dataclass(frozen=True)
class Depth:
    """A candidate: the head alone, or training from a block on."""

    unfreeze: str
    steps: int = 0
    seconds: float = 0.0
    """Estimated time of the whole run on all training images."""
    lr: float = 0.0
    why_lr: str = ""
    folds: int = FOLDS
    """Of FOLDS, on which it is raced: 1 where the time allows no more."""

    @property
    def name(self) -> str:
        return self.unfreeze

    @property
    def is_head(self) -> bool:
        return self.unfreeze == HEAD


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


def steps_of(facts: Facts) -> int:
    """Steps of a stage that trains deeper than the head."""
    epochs = next(passes for most, passes in EPOCHS if facts.train < most)
    return max(LEAST_STEPS, math.ceil(epochs * facts.train / batch_of(facts)))


def depths(
    facts: Facts, chosen: Chosen, cuts: Sequence[str], seconds_of: Callable[[Depth], float], left_s: float
) -> tuple[list[Depth], str]:
    """The depths that can be tried in `left_s` seconds, the head alone first, and a sentence on those that cannot.

    cuts: the blocks from which training could begin, the shallowest first. seconds_of: the estimated time of a run of this depth. Where
    val is too small to judge, each depth is also trained on FOLDS folds, beside the training that is kept. If none fits, the shallowest is
    tried with LEAST_STEPS steps, and on one fold.
    """
    if chosen.per_class is not None:
        return [Depth(HEAD)], "the time allows no more than the head, and of some of the images"
    if facts.train < LEAST_RACED:
        return [Depth(HEAD)], f"{facts.train:,} training images are too few to tell depths apart"
    judged, steps = facts.val >= JUDGES, steps_of(facts)
    if not judged and facts.smallest_n < 2:
        return [Depth(HEAD)], f"{facts.smallest} has a single training image, so that some fold would learn without it; add images of it"

    def timed(cut: str, steps: int, folds: int) -> Depth:
        depth = Depth(cut, steps, lr=USUAL_LR[chosen.transformer], folds=folds)
        return replace(depth, seconds=seconds_of(depth))

    tried, out_of_reach, spent_s = [Depth(HEAD)], [], 0.0
    for cut in cuts:
        depth = timed(cut, steps, FOLDS)
        trying_s = _trying(depth, judged) * depth.seconds
        if spent_s + trying_s + depth.seconds > left_s:
            out_of_reach.append(f"{cut} ({duration(trying_s + depth.seconds)})")
            continue
        tried.append(depth)
        spent_s += trying_s
        if judged:
            break  # val decides between the head and one depth: the shallowest that fits
    said = []
    if out_of_reach:
        said.append(f"out of reach in the time left, {duration(left_s)}: {', '.join(out_of_reach)}; more --minutes try them")
    if len(tried) == 1 and cuts:
        ways = ((LEAST_STEPS, FOLDS),) if judged else ((LEAST_STEPS, FOLDS), (steps, 1), (LEAST_STEPS, 1))
        less = (timed(cuts[0], *way) for way in ways if way != (steps, FOLDS))
        if fits := next((each for each in less if (1 + _trying(each, judged)) * each.seconds <= left_s), None):
            tried.append(fits)
            said.append(f"so {_less(fits, steps, judged)}")
    return tried, "; ".join(said)


def _trying(depth: Depth, judged: bool) -> float:
    """Times that a depth's own training is spent on trying it: a range test, and folds, each of which trains on the others."""
    return LR_STEPS / depth.steps + (0.0 if judged else depth.folds * (FOLDS - 1) / FOLDS)


def _less(depth: Depth, steps: int, judged: bool) -> str:
    """How the trial of a depth was shortened to fit into the time."""
    spared = [f"{depth.steps:,} steps in place of {steps:,}"] if depth.steps < steps else []
    spared += [f"raced on {depth.folds} of {FOLDS} folds"] if depth.folds < FOLDS and not judged else []
    return f"{depth.name} is tried with less: {', '.join(spared)}"


def with_rate(depth: Depth, chosen: Chosen, found: Found | None) -> Depth:
    """The depth with its learning rate. found: what the range test said. None: there was none.

    The test sees the first steps alone, and so moves the usual rate by FAR times at most.
    """
    usual = USUAL_LR[chosen.transformer]
    kind = "transformers" if chosen.transformer else "convolutions"
    common = f"{usual:g} is usual for AdamW on pretrained {kind}"
    if found is None:
        return replace(depth, lr=usual, why_lr=f"{common}; not searched (tltrain lr looks)")
    if found.suggested is None:
        return replace(
            depth, lr=usual, why_lr=f"{common}; in a range test of {LR_STEPS} steps the loss never fell, so that it said nothing"
        )
    lr = float(f"{min(max(found.suggested, usual / FAR), usual * FAR):.0e}")
    told = f"a range test of {LR_STEPS} steps: the loss falls fastest at {found.steepest:.1e} and is lowest at {found.lowest:.1e}"
    kept = "" if lr == found.suggested else f", which suggests {found.suggested:g}; kept within {FAR:g} times the usual"
    return replace(depth, lr=lr, why_lr=f"{told}{kept}; {common}")


def draft(facts: Facts, chosen: Chosen, depth: Depth, name: str, why_depth: str, seed: int = 0) -> Draft:
    """The recipe of a depth. why_depth: why it is this one."""
    reasons = {
        "stages.0.views": "the evaluation view: its features are those of the probe, and are stored already",
        "stages.0.carry": "nothing is trained by steps, so that there is one head to hand on",
        **chosen.reasons,
    }
    data: dict[str, Any] = {"source": facts.source}
    data |= {key: value for key in ("label_separator", "label_columns") if (value := getattr(facts, key)) is not None}
    data |= {key: value for key in ("size", "resize", "per_class") if (value := getattr(chosen, key)) is not None}
    if facts.source in WRITTEN:
        data["flip"] = False
        reasons["data.flip"] = "mirrored characters are others"
    if "data.balance" in chosen.reasons:
        data["balance"] = "weights" if chosen.balanced else "none"
    # Of several labels val has more to say: the threshold of each.
    few = facts.cuts_val and facts.train < FEW_OF_EACH * facts.num_classes and not facts.several
    if few and depth.is_head and chosen.head == "ridge" and chosen.per_class is None:
        data["val_fraction"] = 0
        reasons["data.val_fraction"] = _why_no_val(facts)
    stages: list[dict[str, Any]] = [{"name": "head", "unfreeze": HEAD, "solve": chosen.head, "views": 1, "carry": "last"}]
    if depth.is_head:
        reasons["stages.0.unfreeze"] = why_depth
        reasons["batch"] = "images that are read at once; the head is solved from all of them together"
    else:
        stages.append(_deep(facts, chosen, depth))
        reasons |= _deep_reasons(facts, depth, why_depth)
    values = {
        "name": name, "purpose": f"Chosen by tltrain fit for {facts.source}"[:200], "seed": seed, "batch": batch_of(facts), "data": data,
        "backbone": {"name": chosen.name, "weights": chosen.weights}, **({"select": "map"} if facts.several else {}), "stages": stages,
    }  # fmt: skip
    return Draft(values, {path: reason for path, reason in reasons.items() if path != "data.size" or "size" in data})


def _views(facts: Facts) -> int | None:
    return VIEWS if facts.train < MANY else None


def _deep(facts: Facts, chosen: Chosen, depth: Depth) -> dict[str, Any]:
    return {
        "name": "deep",
        "unfreeze": depth.unfreeze,
        "steps": depth.steps,
        "lr": depth.lr,
        "layer_decay": 0.75 if chosen.transformer else 0.8,
        "weight_decay": 0.05,
        "warmup": WARMUP,
        "augment": "light" if facts.train < MANY else "trivial",
        "views": _views(facts),
        "label_smoothing": 0.1,
        "carry": "best" if facts.val >= JUDGES else "last",
    }


def _why_no_val(facts: Facts) -> str:
    return (
        f"{facts.train:,} training images of {facts.num_classes} classes are few: the {facts.val:,} that val would take are learned from "
        "too. Val would choose nothing here, and ridge scales its probabilities by images that it leaves out. Without val a run "
        "can promise no abstaining: delete this line if you need that"
    )


def _deep_reasons(facts: Facts, depth: Depth, why_depth: str) -> dict[str, str]:
    batch, at = batch_of(facts), "stages.1"
    epochs = depth.steps * batch / facts.train
    least = f": {LEAST_STEPS} steps are the least" if depth.steps == LEAST_STEPS else ""
    reasons = {
        "batch": f"{facts.train / batch:.0f} steps for each pass over {facts.train:,} training images",
        "stages.0.unfreeze": "first the head alone, so that deeper training begins with one that fits (arXiv 2202.10054)",
        f"{at}.unfreeze": why_depth,
        f"{at}.steps": f"{epochs:.0f} epochs{least}; the run takes about {duration(depth.seconds)} here",
        f"{at}.lr": depth.why_lr,
        f"{at}.layer_decay": "blocks near the images know what all images share, and move less (BEiT)",
        f"{at}.weight_decay": "usual for AdamW on pretrained networks",
        f"{at}.warmup": f"{round(WARMUP * depth.steps)} steps, in which AdamW learns how large the gradients are",
        f"{at}.augment": _why_augment(facts, epochs),
        f"{at}.label_smoothing": "a label may be wrong, and no image is worth certainty",
    }
    if facts.train < MANY:
        reasons[f"{at}.views"] = f"what lies below {depth.name} is computed once for each of {VIEWS} views of an image"
    if facts.val >= JUDGES:
        reasons[f"{at}.carry"] = f"{facts.val:,} val images can tell whether this stage paid; if not, the solved head stays"
    else:
        reasons[f"{at}.carry"] = f"{facts.val:,} val images are too few to choose weights by, so that the last are kept"
    return reasons


def _why_augment(facts: Facts, epochs: float) -> str:
    """The rule: what is stored changes mildly, since few views must serve all epochs; fresh views may be any."""
    if facts.train < MANY:
        times = max(1.0, epochs / VIEWS)
        return f"fewer than {MANY:,} images: mild changes, stored; each of {VIEWS} views of an image is seen {times:.0f} times"
    return f"{MANY:,} images and more: another view of each image in each of {epochs:.0f} epochs, of any strength (arXiv 2103.10158)"
