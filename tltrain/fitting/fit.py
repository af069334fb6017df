"""Reads the data, probes backbones, races depths, writes the recipe with its reasons, and trains it. The same command goes on."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.analysis import at_hand
from tltrain.analysis.at_hand import Candidate
from tltrain.analysis.features import FeatureBank
from tltrain.analysis.probe.judge import Ask, Probed, grouped, probe, recipe_of
from tltrain.core import files
from tltrain.core.errors import StoppedAtOnce, UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console, clock, duration
from tltrain.core.recipe import Data
from tltrain.data import open_images
from tltrain.data.splits import folds
from tltrain.fitting import choose, written
from tltrain.fitting.choose import Backbone, Depth, Draft
from tltrain.fitting.facts import facts_of
from tltrain.fitting.memory import Memory, Plan
from tltrain.fitting.race import race
from tltrain.fitting.speeds import speeds_of
from tltrain.heads.out_of_fold import out_of_fold
from tltrain.heads.solve import Kind
from tltrain.runs.report.formatting import percent
from tltrain.training.run import train
from tltrain.training.setup import num_workers

K = 5
"""Folds of the probe."""
HEADS: tuple[Kind, ...] = ("ridge", "logistic")
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


def fit(wanted: Wanted, start: RunFlags, console: Console) -> str:
    """Choose a recipe and train it. Returns finished, stopped or failed; `finished` for a dry run. Raises UserError.

    The folder keeps what is known: what was probed, the race, the recipe, the run. The same call goes on from there.
    """
    if wanted.minutes <= 0:
        raise UserError(f"--minutes is {wanted.minutes:g}; give the time that it may take, such as 10")
    memory = Memory.open(wanted.folder, _asked(wanted))
    try:
        plan = memory.plan or memory.keep(_planned(wanted, start, console, clock()))
    except StoppedAtOnce as stopped:
        console.say(f"stopped by {stopped} before anything trained; the same command goes on with the features that are stored")
        return "stopped"
    draft = _dry(plan, wanted) if wanted.dry_run else _raced(wanted, plan, start, console)
    if draft is None:
        return "stopped"
    where = memory.write(RECIPE, written.text(draft, _head(wanted, plan)))
    console.say(f"recipe  {where}", style="bold")
    if wanted.dry_run:
        console.say(f"train it: tltrain train {where}")
        return "finished"
    return str(train(draft.recipe, replace(start, folder=wanted.folder / RUN))["outcome"])


def _asked(wanted: Wanted) -> dict[str, Any]:
    """What must be the same for a folder to be gone on with."""
    return {"source": wanted.source, "minutes": wanted.minutes, "backbones": list(wanted.backbones), "seed": wanted.seed}


def _planned(wanted: Wanted, start: RunFlags, console: Console, began: float) -> Plan:
    """Everything that is looked at before anything trains."""
    images = open_images(Data(source=wanted.source))
    facts = facts_of(wanted.source, images)
    console.say(f"data    {facts.line()}")
    for note in facts.notes():
        console.say(f"data    {note}", style="yellow")
    candidates = _candidates(wanted, console)
    probed = probe(Ask(wanted.source, k=K, seed=wanted.seed), candidates, start, console)
    candidate = next(c for c in candidates if c.name == probed.knee.backbone)
    with FeatureBank.open(recipe_of(Ask(wanted.source), candidate), start, console, images=images) as bank:
        right = _judged(bank, wanted.seed)
        speeds = speeds_of(bank, num_workers(images, start, 1))
        ids = bank.ids
    kind = max(HEADS, key=lambda k: right[k].mean())
    backbone = Backbone(candidate.spec.name, candidate.spec.weights, kind, _why_backbone(probed), _why_head(right, kind))
    left_s = max(0.0, 60 * wanted.minutes - (clock() - began))
    depths, beyond = choose.depths(facts, speeds, left_s)
    console.say(f"depths  {', '.join(depth.name for depth in depths)}" + (f"; {beyond}" if beyond else ""))
    right_ids = [name for name, is_right in zip(ids, right[kind].tolist(), strict=True) if is_right]
    return Plan(facts, backbone, speeds, tuple(depths), beyond, tuple(right_ids), tuple(probed_lines(probed)))


def _candidates(wanted: Wanted, console: Console) -> Sequence[Candidate]:
    if wanted.backbones:
        return [at_hand.named(name) for name in wanted.backbones]
    known = at_hand.at_hand()
    for name, how in known.absent.items():
        console.say(f"absent  {name}: {how}", style="yellow")
    return known.found


def _judged(bank: FeatureBank, seed: int) -> dict[Kind, np.ndarray]:
    """Kind of head to whether each image (N,) is right, judged by a head that never saw its fold."""
    features_ND, fold_N = bank.features(), folds(bank.labels, bank.groups, K, seed)
    answers = {
        kind: out_of_fold(kind, features_ND, bank.labels, fold_N, len(bank.classes), group_N=grouped(bank), seed=seed) for kind in HEADS
    }
    return {kind: logits_NK.argmax(1).numpy() == bank.labels for kind, logits_NK in answers.items()}


def probed_lines(probed: Probed) -> list[str]:
    """One line for each row of the probe."""
    return [f"{row.name} {percent(row.accuracy)}, {1000 * row.image_s:.1f} ms an image" for row in probed.rows]


def _why_backbone(probed: Probed) -> str:
    best, knee, others = probed.rows[0], probed.knee, len(probed.rows) - 1
    said = f"its solved head is right for {percent(knee.accuracy)} of {probed.num_images:,} images that it did not see ({K} folds; "
    said += f"the most frequent class: {percent(probed.baseline)})"
    if not others:
        return f"{said}; no other was at hand"
    if knee is best:
        return f"{said}, the most of {others + 1} backbones"
    return f"{said}; {best.name} has {percent(best.accuracy)}, which may be luck, and takes {best.image_s / knee.image_s:.1f} times as long"


def _why_head(right: dict[Kind, np.ndarray], kind: Kind) -> str:
    others = ", ".join(f"{k} {percent(float(r.mean()))}" for k, r in right.items() if k != kind)
    return f"worked out, not trained: {percent(float(right[kind].mean()))} out of fold, {others}"


def _dry(plan: Plan, wanted: Wanted) -> Draft:
    """The recipe that a rule of thumb chooses where nothing may train."""
    deep = [depth for depth in plan.depths if depth.cut is not None]
    if deep and plan.facts.train >= LEAST_DEEP:
        why = "not raced, since --dry-run trains nothing: the shallowest depth that fits into the time"
        return _draft(plan, wanted, deep[0], why)
    why = plan.beyond if not deep else f"{plan.facts.train:,} training images are few, and --dry-run races nothing: the head alone"
    return _draft(plan, wanted, plan.depths[0], why)


def _raced(wanted: Wanted, plan: Plan, start: RunFlags, console: Console) -> Draft | None:
    """The recipe of the depth that the race chose. None if a signal stopped it."""
    deep = [depth for depth in plan.depths if depth.cut is not None]
    if not deep:
        return _draft(plan, wanted, plan.depths[0], f"the head alone: {plan.beyond}")
    if plan.facts.val >= choose.JUDGES:
        why = f"the shallowest depth that fits into the time; {plan.facts.val:,} val images judge whether it paid"
        return _draft(plan, wanted, deep[0], why)
    hidden = _without_test(wanted)
    recipes = {depth.name: _draft(plan, wanted, depth, "").recipe.override(hidden) for depth in deep}
    raced = race(wanted.folder / RACE, recipes, plan.right, start, console)
    if raced is None:
        return None
    chosen = next(depth for depth in plan.depths if depth.name == raced.chosen)
    console.say(raced.sentence, style="bold")
    return _draft(plan, wanted, chosen, raced.sentence)


def _without_test(wanted: Wanted) -> dict[str, Any]:
    """What hides the test images from a recipe, path to value: a choice must not see them. Those that the source itself declares are in no
    fold anyway."""
    images, alone = open_images(Data(source=wanted.source)), {"data.val_fraction": 0, "data.test_fraction": 0}
    if images.test is None or (images.source is not None and "test" in images.source.declared):
        return alone
    path = wanted.folder / EXCLUDED
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["path"], *([name] for name in images.test.ids)])  # paths are read as they stand
    files.write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))
    return {**alone, "data.exclude": str(path)}


def _draft(plan: Plan, wanted: Wanted, depth: Depth, why: str) -> Draft:
    return choose.draft(plan.facts, plan.backbone, plan.speeds, depth, wanted.folder.name or "fit", why, wanted.seed)


def _head(wanted: Wanted, plan: Plan) -> list[str]:
    return [
        f"Chosen by tltrain fit for {wanted.source}, in {duration(60 * wanted.minutes)} on {plan.speeds.device}: {plan.facts.line()}.",
        f"Probed: {'; '.join(plan.probed)}.",
    ]
