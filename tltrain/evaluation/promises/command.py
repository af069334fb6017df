"""`tltrain evaluate`: the metrics of a run, and the guarantees (coverage, accuracy of answers) that val supports."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tltrain.core.errors import UserError
from tltrain.core.output import escape, wrapping
from tltrain.distributed.runtime import torch_settings_kept
from tltrain.evaluation.evaluate import evaluate, opened_run
from tltrain.evaluation.promises import kept
from tltrain.evaluation.promises.fitted import Wanted, num_groups, rules_for, shown_without_asking
from tltrain.uncertainty.answers import GROUPED

OWN = {
    "val": "sets and thresholds were fitted on these very images, which therefore look better than others would",
    "train": "the network was trained on these very images: what sets and thresholds do on them says nothing of others",
    "all": "among these are images that the network was trained on, and those that sets and thresholds were fitted on: new ones look worse",
}
"""Warnings where rules are evaluated on the run's own images, by split."""


def figures_of(run: Path, source: str | None, which: str, device_batch: int, wanted: Wanted) -> dict[str, Any]:
    """As `evaluation.evaluate.evaluate`, with the rules that a command asks for, and else the usual ones. Raises UserError."""
    wanted.check()
    own, notes = which != "test" and source is None, list[str]()  # of other images `evaluate` notes which the run learned from
    if wanted.strangers and source is not None and not kept.strangers_file(run).is_file():
        with torch_settings_kept():
            opened_run(run, source, which, strangers=True)  # refused before the features of thousands of images are computed
    asked = rules_for(run, wanted, lambda text: wrapping.say(escape.line(text), sys.stderr), device_batch)
    if not asked.sets and not asked.abstentions and not own:
        try:
            usual = shown_without_asking(run, wanted.num_views)
            asked = replace(asked, sets=usual.sets, abstentions=usual.abstentions, val=usual.val)
            notes += [] if (groups := num_groups(usual)) is None else [GROUPED.format(groups)]
        except UserError as error:  # nobody asked for them
            notes.append(f"without sets and answers withheld: {error}")
    elif own and (asked.sets or asked.abstentions):
        notes.append(OWN[which])
    figures = evaluate(run, source, which, device_batch, asked)
    return figures | {"notes": [*figures["notes"], *notes]}
