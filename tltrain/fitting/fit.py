"""Reads the data, probes backbones, races depths, writes the recipe with its reasons, and trains it. The same command goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tltrain.analysis import at_hand
from tltrain.analysis.at_hand import Candidate
from tltrain.analysis.features import FeatureBank
from tltrain.analysis.probe.judge import Ask, Probed, recipe_of, which_of
from tltrain.analysis.samples import WITHOUT_TEST, samples_of
from tltrain.core.errors import StoppedAtOnce, UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console, clock, duration
from tltrain.core.recipe import Backbone, Data
from tltrain.data import DataSplits, class_counts, open_images
from tltrain.evaluation.kept_data import learned
from tltrain.fitting import choose, written
from tltrain.fitting.choose import FOLDS, LR_STEPS, USUAL_LR, Chosen, Depth, Draft, with_rate
from tltrain.fitting.facts import Facts, facts_of
from tltrain.fitting.looking import K, choose_head, per_class_for, probe_in_time, probe_sizes
from tltrain.fitting.lr_range import measured, range_recipe
from tltrain.fitting.memory import Memory, Plan
from tltrain.fitting.race import race
from tltrain.fitting.timing import network_of, seconds_of
from tltrain.runs.report.formatting import percent
from tltrain.runs.run_dir import outcome
from tltrain.training.depths.hidden import without_test
from tltrain.training.depths.judge import HEAD, Raced
from tltrain.training.run import train

PROBE_SHARE, SIZE_SHARE, HEAD_SHARE = 0.25, 0.15, 0.15
"""Of the time that is left: for the probe of backbones, for other sizes, and for logistic regression beside ridge."""
TRAIN_SHARE = 0.25
"""Of all the time, for the training that is kept, also where choosing took longer, such as on a busy machine."""
HIGHEST = 100.0
"""Times the usual learning rate at which a range test ends."""
NO_SPLITS = {"data.val_fraction": 0, "data.test_fraction": 0}
"""Of the race: its folds judge."""
LOOKED_AT = 16
"""Images that a range test is evaluated on: its loss in training says everything."""
LEAST_DEEP = 200
"""Training images from which a dry run, which races nothing, writes a deep stage."""
RECIPE, RUN, RACE, EXCLUDED = "recipe.yaml", "run", "race", "test_images.csv"


@dataclass(frozen=True)
class Wanted:
    """What a person asks for."""

    source: str
    """As `data.source` of a recipe."""
    folder: Path
    minutes: float = 10.0
    backbones: tuple[str, ...] = ()
    """Names as `tltrain probe` takes them. Empty: those at hand without a network."""
    seed: int = 0
    dry_run: bool = False
    label_separator: str | None = None
    """As data.label_separator of a recipe: an image may have several labels."""
    label_columns: tuple[str, ...] | None = None
    """As data.label_columns."""

    @property
    def data(self) -> Data:
        """The images. Raises UserError for settings that do not go together."""
        return recipe_of(self.ask, Candidate("any", Backbone(name="resnet-tiny"))).data

    @property
    def ask(self) -> Ask:
        """What is probed."""
        return Ask(self.source, k=K, seed=self.seed, label_separator=self.label_separator, label_columns=self.label_columns)


def fit(wanted: Wanted, start: RunFlags, console: Console) -> str:
    """Choose a recipe and train it. Returns finished, stopped or failed; `finished` for a dry run. Raises UserError.

    The folder keeps what is known: what was probed, the race, the recipe, the run. The same call goes on from there.
    """
    if not (math.isfinite(wanted.minutes) and wanted.minutes > 0):
        raise UserError(f"--minutes is {wanted.minutes:g}; give the time that it may take, such as 10")
    memory = Memory.open(wanted.folder, _asked(wanted))
    if memory.of_another:
        return _of_another(wanted.folder, console)
    memory.check_recipe(RECIPE)
    try:
        plan = memory.plan or memory.keep(_planned(wanted, start, console, clock()))
    except StoppedAtOnce as stopped:
        console.say(f"stopped by {stopped} before anything trained; the same command goes on with the features that are stored")
        return "stopped"
    draft = _dry(plan, wanted) if wanted.dry_run else _raced(wanted, plan, start, console)
    if draft is None:
        return "stopped"
    where = memory.write_recipe(RECIPE, written.text(draft, _head(wanted, plan)))
    console.say(f"recipe  {where}", style="bold")
    if wanted.dry_run:
        console.say(f"train it: tltrain train {where}")
        return "finished"
    return str(train(draft.recipe, replace(start, folder=wanted.folder / RUN))["outcome"])


def _of_another(folder: Path, console: Console) -> str:
    """What becomes of a folder whose plan cannot be read. Raises UserError where its run is not finished."""
    if outcome(folder / RUN).get("outcome") != "finished":
        raise UserError(
            f"{folder} holds a fit of another version of tltrain, which is not finished; go on with that version, or choose another folder "
            "with --folder"
        )
    console.say(f"run     {folder / RUN} is finished, by another version of tltrain")
    return "finished"


def _asked(wanted: Wanted) -> dict[str, Any]:
    """What must be the same for a folder to be gone on with."""
    labels = {"label_separator": wanted.label_separator, "label_columns": wanted.label_columns and list(wanted.label_columns)}
    asked = {"source": wanted.source, "minutes": wanted.minutes, "backbones": list(wanted.backbones), "seed": wanted.seed}
    return asked | labels


def _planned(wanted: Wanted, start: RunFlags, console: Console, began: float) -> Plan:
    """Everything that is looked at before anything trains."""

    def left_s() -> float:
        return max(0.0, 60 * wanted.minutes - (clock() - began))

    images = open_images(wanted.data)
    facts = facts_of(wanted.data, images)
    console.say(f"data    {facts.line()}")
    for note in facts.notes():
        console.say(f"data    {note}", style="yellow")
    candidates, ask = _candidates(wanted, console), wanted.ask
    _check_new(candidates, images, wanted.data)
    probed, limit = probe_in_time(ask, candidates, images, start, console, PROBE_SHARE * left_s())
    candidate = next(c for c in candidates if c.name == probed.knee.backbone)
    own = network_of(recipe_of(ask, candidate), images, start, with_cuts=False)
    ask = replace(ask, per_class=limit.per_class)
    size = probe_sizes(ask, candidate, probed, images, own, facts.side, start, console, SIZE_SHARE * left_s())
    recipe = recipe_of(replace(ask, size=size.size, resize=size.resize), candidate)
    with FeatureBank.open(recipe, start, console, which=which_of(ask)) as bank:
        head = choose_head(bank, size.judged, facts, HEAD_SHARE * left_s(), wanted.seed)
    reasons = {"backbone.name": _why_backbone(probed, limit.beyond), "data.size": size.why, "stages.0.solve": head.why}
    reasons |= {"data.resize": size.why_resize} if size.resize is not None else {}
    reasons |= {"data.balance": head.why_balance} if head.why_balance else {}
    spec = candidate.spec
    chosen = Chosen(
        spec.name, spec.weights, head.kind, own.transformer, own.device, reasons, size.size, size.resize, balanced=head.balanced
    )
    facts, chosen, images = _affordable(wanted, facts, chosen, images, start, max(left_s(), TRAIN_SHARE * 60 * wanted.minutes))
    right = tuple(name for name, is_right in zip(head.ids, head.right.tolist(), strict=True) if is_right)
    plan = Plan(facts, chosen, (), "", head.ids, right, tuple(probed_lines(probed)))
    cuts = network_of(_draft(plan, wanted, Depth(HEAD), "").recipe, images, start).cuts
    depths, beyond = choose.depths(
        facts, chosen, cuts, lambda depth: seconds_of(_draft(plan, wanted, depth, "").recipe, images, start), left_s()
    )
    console.say(f"depths  {', '.join(depth.name for depth in depths)}" + (f"; {beyond}" if beyond else ""))
    return replace(plan, depths=tuple(depths), beyond=beyond)


def _candidates(wanted: Wanted, console: Console) -> Sequence[Candidate]:
    if wanted.backbones:
        return [at_hand.named(name) for name in wanted.backbones]
    known = at_hand.at_hand()
    for name, how in known.absent.items():
        console.say(f"absent  {name}: {how}", style="yellow")
    return known.found


def _check_new(candidates: Sequence[Candidate], images: DataSplits, data: Data) -> None:
    """Check that no network has learned from the images that a probe would judge it by. Raises UserError."""
    for weights in () if images.source is None else dict.fromkeys(each.spec.weights for each in candidates):
        assert images.source is not None
        if num := len(learned(weights, data, images.source)):
            raise UserError(
                f"--backbones: {weights} is of a run that has learned from {num:,} of these {len(images.source.ids):,} images, so that "
                "they would not be new to it, and no probe could judge it; give weights that have not seen them"
            )


def _affordable(
    wanted: Wanted, facts: Facts, chosen: Chosen, images: DataSplits, start: RunFlags, left_s: float
) -> tuple[Facts, Chosen, DataSplits]:
    """The images that the head can be worked out from in the time: all, or some of each class."""
    recipe = choose.draft(facts, chosen, Depth(HEAD), "fit", "", wanted.seed).recipe
    whole_s = seconds_of(recipe, images, start)
    counts = class_counts(images.train.labels, facts.num_classes).tolist()
    per_class = per_class_for(counts, left_s / max(whole_s, 1e-9))
    if whole_s <= left_s or per_class >= max(counts):
        return facts, chosen, images
    why = f"all {facts.train:,} images would take {duration(whole_s)}, and {duration(left_s)} are left; more --minutes learn from more"
    chosen = replace(chosen, per_class=per_class, reasons={**chosen.reasons, "data.per_class": why})
    images = open_images(wanted.data.model_copy(update={"per_class": per_class}))
    return facts_of(wanted.data, images), chosen, images


def probed_lines(probed: Probed) -> list[str]:
    """One line for each row of the probe."""
    return [f"{row.name} {row.judged.shown}, {1000 * row.image_s:.1f} ms an image" for row in probed.rows]


def _why_backbone(probed: Probed, beyond: str) -> str:
    best, knee, others = probed.rows[0], probed.knee, len(probed.rows) - 1
    right, base = f"is right for {percent(knee.accuracy)}", "the most frequent class"
    if probed.ask.several:
        right, base = f"has mAP {percent(knee.accuracy)}, the mean over labels,", "a random order"
    said = f"its solved head {right} of {probed.num_images:,} images that it did not see ({K} folds; {base}: {percent(probed.baseline)})"
    if not others:
        said += "; no other was looked at" if beyond else "; no other was at hand"
    elif knee is best:
        said += f", the most of {others + 1} backbones"
    else:
        slower = f"{best.image_s / knee.image_s:.1f} times as long"
        said += f"; {best.name} has {percent(best.accuracy)}, which may be luck, and takes {slower}"
    return f"{said}; {beyond}" if beyond else said


def _dry(plan: Plan, wanted: Wanted) -> Draft:
    """The recipe that a rule of thumb chooses where nothing may train."""
    deep = [with_rate(depth, plan.chosen, None) for depth in plan.depths if not depth.is_head]
    if deep and plan.facts.train >= LEAST_DEEP:
        why = "not raced, since --dry-run trains nothing: the shallowest depth that fits into the time"
        return _draft(plan, wanted, deep[0], why)
    why = plan.beyond if not deep else f"{plan.facts.train:,} training images are few, and --dry-run races nothing: the head alone"
    return _draft(plan, wanted, plan.depths[0], why)


def _raced(wanted: Wanted, plan: Plan, start: RunFlags, console: Console) -> Draft | None:
    """The recipe of the depth that the race chose. None if a signal stopped it."""
    if all(depth.is_head for depth in plan.depths):
        return _draft(plan, wanted, plan.depths[0], f"the head alone: {plan.beyond}")
    judged = plan.facts.val >= choose.JUDGES
    hidden = {} if judged else {**without_test(wanted.data, wanted.folder / EXCLUDED), **NO_SPLITS}
    deep = _with_rates(wanted, plan, hidden if judged else {**hidden, "data.folds": FOLDS, "data.fold": 0}, start, console)
    if deep is None:
        return None
    if judged:
        why = f"the shallowest depth that fits into the time; {plan.facts.val:,} val images judge whether it paid"
        return _draft(plan, wanted, deep[0], why)
    raced = _against_head(wanted, plan, deep, hidden, start, console)
    if raced is None:
        return None
    console.say(raced.sentence, style="bold")
    chosen = next(depth for depth in (Depth(HEAD), *deep) if depth.name == raced.chosen)
    return _draft(plan, wanted, chosen, raced.sentence + (f"; {plan.beyond}" if plan.beyond else ""))


def _against_head(
    wanted: Wanted, plan: Plan, deep: Sequence[Depth], hidden: dict[str, Any], start: RunFlags, console: Console
) -> Raced | None:
    """The race. A head of the probe that learned from some of the images alone is no match for depths that learn from all: it is raced.

    So is that of several labels, since the plan keeps what is right, and no logits."""
    all_judged = len(plan.judged) >= plan.facts.train + plan.facts.val and not plan.facts.several
    by_head = {name: 0.0 for name in plan.judged} | {name: 1.0 for name in plan.right} if all_judged else None
    depths = deep if all_judged else [Depth(HEAD, folds=deep[0].folds), *deep]
    recipes = [(depth, _draft(plan, wanted, depth, "").recipe.override(hidden)) for depth in depths]
    samples = samples_of(open_images(wanted.data), WITHOUT_TEST)
    groups = dict(zip(samples.ids, samples.groups.tolist(), strict=True))
    return race(wanted.folder / RACE, recipes, by_head, groups, start, console)


def _with_rates(wanted: Wanted, plan: Plan, changes: dict[str, Any], start: RunFlags, console: Console) -> list[Depth] | None:
    """The deeper depths, each with the learning rate of its range test. None if a signal stopped one.

    changes: to the recipe, so that the test reads the stores that the race, or the training, reads.
    """
    rated: list[Depth] = []
    for depth in plan.depths:
        if depth.is_head:
            continue
        console.say(f"rate    {depth.name}: {LR_STEPS} steps in which the learning rate rises", style="bold")
        unchosen = {"select": "loss"} if plan.facts.several else {}  # a few images may have none of the labels, and mAP no value
        recipe = _draft(plan, wanted, depth, "").recipe.override({**changes, **unchosen, "data.eval_limit": LOOKED_AT})
        rising = range_recipe(recipe, None, LR_STEPS, HIGHEST * USUAL_LR[plan.chosen.transformer])
        outcome, found = measured(rising, replace(start, folder=wanted.folder / RACE / f"{depth.name}-lr"))
        if outcome == "stopped":
            return None
        rated.append(with_rate(depth, plan.chosen, found))
        console.say(f"rate    {depth.name}: {rated[-1].lr:g}, {rated[-1].why_lr}")
    return rated


def _draft(plan: Plan, wanted: Wanted, depth: Depth, why: str) -> Draft:
    return choose.draft(plan.facts, plan.chosen, depth, wanted.folder.name or "fit", why, wanted.seed)


def _head(wanted: Wanted, plan: Plan) -> list[str]:
    return [
        f"Chosen by tltrain fit for {wanted.source}, asked to take {wanted.minutes:g} min on {plan.chosen.device}: {plan.facts.line()}.",
        f"Probed: {'; '.join(plan.probed)}.",
    ]
