"""Chooses between depths by their predictions on the same images, compared image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tltrain.evaluation.multilabel.judged import by_answers
from tltrain.runs.record import read_predictions
from tltrain.runs.report.formatting import percent

HEAD = "head"
Answers = Mapping[str, float | np.ndarray]
"""Image to 1.0 where a network that never saw it was right, else 0.0. Of several labels: (2, K), its logits, and 1 where it has a label."""


def answers_of(runs: Sequence[Path]) -> Answers:
    """Of runs that were each tested on a fold."""
    found: dict[str, float | np.ndarray] = {}
    for run in runs:
        predicted = read_predictions(run)
        assert predicted is not None, "a finished run on a fold has been tested"
        found |= predicted.answers_by_id
    return found


@dataclass(frozen=True)
class Raced:
    """The chosen depth, the accuracy of each (of several labels mAP), and the sentence that says why."""

    chosen: str
    accuracy: Mapping[str, float]
    sentence: str


def choose_depth(answers: Mapping[str, Answers], groups: Mapping[str, int] | None = None) -> Raced:
    """The shallowest depth that the best cannot be told from.

    answers: name of a depth, shallow first, to its answers. Images that not all depths predicted are left out.
    groups: image to its group, where images of a group are alike. None or empty: each stands alone.
    """
    ids = sorted(set.intersection(*(set(each) for each in answers.values())))
    group_N = np.array([groups[i] for i in ids]) if groups else None
    if group_N is not None and len(np.unique(group_N)) == len(ids):
        group_N = None
    judged = {name: by_answers(np.array([each[i] for i in ids]), group_N) for name, each in answers.items()}
    order, accuracy = list(judged), {name: each.value for name, each in judged.items()}
    best = max(order, key=accuracy.__getitem__)  # of equal ones the shallowest
    low = {name: 0.0 if name == best else judged[best].lead(judged[name]).low for name in order}
    chosen = shallowest(order, best, low)
    by = " by mAP" if len(judged[best].draws) else ""
    return Raced(chosen, accuracy, _sentence(order, accuracy, best, chosen, f"race on {len(ids):,} images{by}"))


def shallowest(order: Sequence[str], best: str, low: Mapping[str, float]) -> str:
    """The shallowest depth that the best cannot be told from.

    order: the names, shallow first. low: the lower end of the interval of the best's lead over each, paired.
    """
    return next(name for name in order if name == best or low[name] <= 0)


def _sentence(order: list[str], accuracy: Mapping[str, float], best: str, chosen: str, what: str) -> str:
    each = ", ".join(f"{name} {percent(accuracy[name])}" for name in order)
    told = f"{what}, each judged by a network that never saw it: {each}"
    if chosen == HEAD:
        pays = "training deeper does not pay here" if best == HEAD else "training deeper pays no more than luck would"
        return f"{told}; {pays}: the head alone"
    others = "" if chosen == best else f", which {best} leads by no more than luck would"
    return f"{told}; chosen: {chosen}{others}"
