"""Rules of a run: fitted on what its folder keeps, or on a pass over its own images, which is then kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import softmax

from tltrain.core.errors import UserError
from tltrain.data import DataSplits, Split
from tltrain.data.dataset import groups_in
from tltrain.distributed.out_of_memory import fitting
from tltrain.distributed.runtime import Runtime, torch_settings_kept
from tltrain.evaluation.calibration import fit_temperature
from tltrain.evaluation.evaluate import Asked, NoSplit, Opened, opened_run
from tltrain.evaluation.evaluator import features, predict, predict_views
from tltrain.evaluation.metrics import Predictions
from tltrain.evaluation.multilabel.fitting import fit_temperature as fit_temperature_of_labels
from tltrain.evaluation.multilabel.fitting import fit_thresholds
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.evaluation.promises import kept
from tltrain.models.metadata import WeightsMetadata
from tltrain.runs import data_record, run_dir
from tltrain.uncertainty import abstain, answers, conformal
from tltrain.uncertainty.abstain import Abstention
from tltrain.uncertainty.answers import GROUPED, Answers, Val
from tltrain.uncertainty.strangers import MOST_IMAGES, Strangers, fit_strangers

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """Options of predict and evaluate: coverage of sets, accuracy of answers, detection of strangers, views of each image."""

    coverage: float | None = None
    abstain: float | None = None
    strangers: bool = False
    num_views: int = 1

    def flags(self) -> list[str]:
        """The options that are set, as command-line flags."""
        asked = {"--coverage": self.coverage, "--abstain": self.abstain, "--strangers": self.strangers, "--views": self.num_views > 1}
        return [name for name, value in asked.items() if value]

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name, value in (("coverage", self.coverage), ("abstain", self.abstain)):
            if value is not None:
                answers.share(name, value)
        if not 1 <= self.num_views <= MOST_VIEWS:
            raise UserError(f"views is {self.num_views}; it must be from 1 to {MOST_VIEWS}")


MOST_VIEWS = 64


def rules_for(run: Path, wanted: Wanted, say: Say, device_batch: int = 128) -> Asked:
    """The rules that a command asked for. Those of a test where it asks for none and val's answers are kept.

    say: receives a line for each computation that is needed first, and one for the guarantee of each rule. Raises UserError.
    """
    wanted.check()
    run_dir.finished_weights(run)
    if run_dir.read_recipe(run).data.multilabel and (asked_for := wanted.flags()):
        raise UserError(f"{run} names several labels an image, and {', '.join(asked_for)} is of one class an image; leave it out")
    asked = Asked(wanted.num_views)
    if wanted.coverage is not None or wanted.abstain is not None:
        val = val_answers(run, say, wanted.num_views, device_batch)
        if wanted.coverage is not None:
            asked = replace(asked, sets=[conformal.fit_sets(val, wanted.coverage)])
        if wanted.abstain is not None:
            asked = replace(asked, abstentions=[abstain.fit_abstention(val, wanted.abstain)])
        for line in promised(asked):
            say(line)
    if wanted.strangers:
        asked = replace(asked, strangers=strangers_of(run, say, device_batch))
    return asked


def usual(val: Answers | None) -> Asked:
    """The rules that a run's test shows: those of the usual levels that val can promise. None of them without val."""
    if val is None:
        return Asked()
    return Asked(sets=conformal.reachable(val), abstentions=abstain.reachable(val), val=Val(len(val), val.num_groups))


def promised(asked: Asked) -> list[str]:
    """The guarantee of each rule and what it is based on, one line each."""
    lines = []
    for sets in asked.sets:
        low, high = (100 * end for end in sets.between)
        luck = f"by the luck of its {sets.num_val:,} val images {low:.1f} to {high:.1f} %"
        lines.append(f"sets    at least {100 * sets.coverage:g} % hold the true class; {luck}")
    for rule in asked.abstentions:
        how = f"up to a confidence of {rule.threshold:.4f}" if rule.threshold else "from nothing: all of val reach it"
        on_val = f"on val {rule.answered:,} of {rule.num_val:,} answered, {100 * rule.right / rule.answered:.1f} % right"
        lines.append(f"abstain {how}; {on_val}")
        if rule.is_promised:
            lines.append(f"abstain promised for other images, with 95 % confidence: at least {100 * rule.least:.1f} % of answers are right")
        else:
            lines.append(f"abstain {too_few(rule)}")
    if groups := num_groups(asked):
        lines.append(f"note    {GROUPED.format(groups)}")
    if lines:
        lines.append(
            "note    both hold for images like those of val; val also chose the weights and the temperature, which flatters it a little"
        )
    return lines


def too_few(rule: Abstention) -> str:
    """The line for a rule whose val is too small for any guarantee."""
    needs = f"to promise that {100 * rule.target:g} % of answers are right takes at least {abstain.least_images(rule.target):,}, all right"
    return f"{Val(rule.num_val, rule.num_groups)}, too few to promise anything of other images: {needs}"


def num_groups(asked: Asked) -> int | None:
    """Number of groups in val, if it has any: the guarantees are then too optimistic. None: each image stands alone."""
    found = [rule.num_groups for rule in asked.sets] + [rule.num_groups for rule in asked.abstentions]
    return next((num for num in found if num is not None), None)


def groups_of(images: DataSplits, split: Split | None) -> int | None:
    """How many groups the images of a split lie in. None as `groups_in`."""
    group_N = groups_in(images, split)
    return None if group_N is None else len(np.unique(group_N))


def fit_answers(said: tuple[np.ndarray, np.ndarray] | None, num_groups: int | None = None) -> tuple[float, Answers | None]:
    """(the calibration temperature, answers with it) from logits (N, K) of val and labels (N,). (1, None) without val.

    num_groups: as in `Answers`.
    """
    if said is None:
        return 1.0, None
    logits_NK, label_N = said
    temperature = fit_temperature(logits_NK, label_N)
    p_NK = softmax(logits_NK / temperature, axis=1)
    return temperature, Answers(p_NK.max(1), p_NK[np.arange(len(label_N)), label_N], p_NK.argmax(1) == label_N, num_groups)


@dataclass(frozen=True)
class Fitted:
    """What is fitted on val at the end of a run."""

    temperature: float = 1.0
    thresholds: tuple[float, ...] | None = None
    """Of several labels: (K,) the calibrated probability from which each class is named."""
    val: Answers | None = None
    """The answers that rules are fitted on. None without val, and of several labels."""

    def on(self, card: WeightsMetadata) -> WeightsMetadata:
        """The card of the weights with what was fitted."""
        return replace(card, temperature=self.temperature, thresholds=self.thresholds)


def fit_on_val(
    images: DataSplits,
    logits: Callable[[Split], tuple[np.ndarray, np.ndarray]],
    answers_of: Callable[[Split], Predictions | LabelPredictions],
) -> Fitted:
    """Fit on val. logits: gives the logits and labels of a split; answers_of: its answers, where images have several labels."""
    if images.train.labels.ndim == 2:
        if images.val is None:
            return Fitted(1.0, (0.5,) * len(images.classes))
        said = answers_of(images.val)
        assert isinstance(said, LabelPredictions)
        said = replace(said, temperature=fit_temperature_of_labels(said))
        return Fitted(said.temperature, fit_thresholds(said))
    temperature, val = fit_answers(None if images.val is None else logits(images.val), groups_of(images, images.val))
    return Fitted(temperature, None, val)


def val_answers(run: Path, say: Say, num_views: int = 1, device_batch: int = 128) -> Answers:
    """The run's predictions on val, read from the run folder, or computed and written there. Raises UserError for a run without val."""
    if (held := kept.read_val(run, num_views)) is not None:
        return held
    with torch_settings_kept():
        runtime, opened = _on_val(run, say)
        seen = "" if num_views == 1 else f", {num_views} views each"
        say(f"val     its {len(opened.split):,} images are answered once{seen}, to fit on")

        def answered(batch: int) -> Predictions:
            batches = opened.loader(runtime, opened.split, batch, num_views)
            if num_views > 1:
                return predict_views(runtime, opened.chain, batches, num_views, opened.temperature)[0]
            return predict(runtime, opened.chain, batches, opened.temperature)

        p = fitting(answered, device_batch)[0] if runtime.world == 1 else answered(device_batch)
    assert p.own is not None
    found = Answers(p.calibrated, p.own, p.predicted == p.label, groups_of(opened.images, opened.split))
    _keep(runtime, opened, say, lambda: kept.write_val(run, found, num_views))
    return found


def strangers_of(run: Path, say: Say, device_batch: int = 128) -> Strangers:
    """The detector of strangers, read from the run or fitted on its train and val features. Raises UserError for a run without val."""
    if (held := kept.read_strangers(run)) is not None:
        return held
    with torch_settings_kept():
        runtime, opened = _on_val(run, say)
        train, val = opened.images.train, opened.split
        num = min(len(train), MOST_IMAGES) + len(val)
        say(f"images  the features of {num:,} train and val images are computed once, to tell strangers by")

        def computed(batch: int) -> list[np.ndarray]:
            loaders = [opened.loader(runtime, split, batch, limit=MOST_IMAGES) for split in (train, val)]
            return [features(runtime, opened.chain, opened.head, loader) for loader in loaders]

        parts = fitting(computed, device_batch)[0] if runtime.world == 1 else computed(device_batch)
    found = fit_strangers(*parts)
    _keep(runtime, opened, say, lambda: kept.write_strangers(run, found))
    return found


def _on_val(run: Path, say: Say) -> tuple[Runtime, Opened]:
    """The run with its own val images. Raises UserError for a run without any, and where it is not known which they were."""
    try:
        runtime, opened = opened_run(run, None, "val")
    except NoSplit as error:
        raise UserError(
            f"{run} has no val images, and what it can promise is fitted on them; train with data.val_fraction above 0"
        ) from error
    if opened.notes and (opened.images.source is None or data_record.read(run) is None):
        raise UserError(f"{run} can promise nothing: {opened.notes[0]}; put the data back as it was, or train again")
    for note in opened.notes:
        say(f"note    {note}")
    return runtime, opened


def _keep(runtime: Runtime, opened: Opened, say: Say, write: Callable[[], None]) -> None:
    """Write the fitted values, on one process. If the folder cannot be written, a line says so and the command goes on."""
    if not runtime.is_main:
        return
    if opened.notes:
        say("note    what was worked out is not kept, since the data has changed: it is worked out again next time")
        return
    try:
        write()
    except OSError as error:
        say(f"note    what was worked out cannot be kept, and is worked out again next time: {error}")


def shown_without_asking(run: Path, num_views: int) -> Asked:
    """The usual rules, where val's answers by so many views are kept already."""
    return replace(usual(kept.read_val(run, num_views)), num_views=num_views)
