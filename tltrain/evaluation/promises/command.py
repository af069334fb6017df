"""`tltrain evaluate`: the figures of a run, with what val promises of its answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.distributed.runtime import torch_settings_kept
from tltrain.evaluation.evaluate import evaluate, opened_run
from tltrain.evaluation.promises import kept
from tltrain.evaluation.promises.fitted import Wanted, num_groups, rules_for, shown_without_asking
from tltrain.runs import run_dir
from tltrain.runs.report.stats import wilson
from tltrain.uncertainty.answers import GROUPED

OWN = {
    "val": "sets and thresholds were fitted on these very images, which therefore look better than others would",
    "train": "the network was trained on these very images: what sets and thresholds do on them says nothing of others",
    "all": "among these are images that the network was trained on, and those that sets and thresholds were fitted on: new ones look worse",
}
"""What is said of rules on the run's own images, by split."""


def figures_of(run: Path, source: str | None, which: str, device_batch: int, wanted: Wanted) -> dict[str, Any]:
    """As `evaluation.evaluate.evaluate`, with the rules that a command asks for, and else the usual ones. Raises UserError."""
    wanted.check()
    own, notes = which != "test" and (source is None or source == run_dir.read_recipe(run).data.source), list[str]()
    if wanted.strangers and source is not None and not kept.strangers_file(run).is_file():
        with torch_settings_kept():
            opened_run(run, source, which, strangers=True)  # refused before the features of thousands of images are computed
    asked = rules_for(run, wanted, lambda text: print(escape.line(text), file=sys.stderr), device_batch)
    if not asked.sets and not asked.abstentions and not own:
        try:
            usual = shown_without_asking(run, wanted.num_views)
            asked = replace(asked, sets=usual.sets, abstentions=usual.abstentions)
            notes += [] if (groups := num_groups(usual)) is None else [GROUPED.format(groups)]
        except UserError as error:  # nobody asked for them
            notes.append(f"without sets and answers withheld: {error}")
    elif own and (asked.sets or asked.abstentions):
        notes.append(OWN[which])
    figures = evaluate(run, source, which, device_batch, asked)
    return figures | {"notes": [*figures["notes"], *notes]}


def doubt_lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """What the figures say of sets, answers withheld, strangers and views, for a terminal."""
    for sets in figures.get("sets", ()):
        said = f"set of {100 * sets['coverage']:g} %"
        yield f"{said:18} {_share(sets['covered'], sets['n'])} hold the true class, mean size {sets['mean_size']:.2f}"
        for row in sets["per_class"]:
            if wilson(row["covered"] / row["n"], row["n"])[1] < sets["coverage"]:  # clearly less than what is promised for all together
                yield f"{'':18} {_share(row['covered'], row['n'])} of class {escape.line(row['name'])}"
    for rule in figures.get("abstain", ()):
        said, answered = f"abstain {100 * rule['target']:g} %", rule["answered"]
        right = f"{_share(rule['right'], answered)} right" if answered else "none"
        yield f"{said:18} {100 * answered / rule['n']:.1f} % answered, {right}, promised {100 * rule['least']:.1f} %"
    if (strangers := figures.get("strangers")) is not None:
        for name, rows in (("known images", strangers["known"]), ("strangers", strangers["strange"])):
            if rows is not None:
                yield f"{name:18} {_share(rows['marked'], rows['n'])} of {rows['n']:,} are marked as strangers"
        if strangers["auroc"] is not None:
            yield f"{'AUROC':18} {strangers['auroc']:.4f} of strangeness between the two"
            yield f"{'FPR at 95 %':18} {100 * strangers['strangers_missed_at_95']:.1f} % of strangers kept where 95 % of the known are"
    if (views := figures.get("views")) is not None:
        low, high = (100 * end for end in views["interval"])
        gained = f"{100 * views['difference']:+.2f} points of accuracy ({low:+.2f} to {high:+.2f})"
        yield f"{views['num']:<2} views           {gained} against one view, {100 * views['top1_of_one']:.2f} %"


def _share(part: int, of: int) -> str:
    low, high = wilson(part / of, of)
    return f"{100 * part / of:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
