"""Chooses between depths by their predictions on the same images, compared image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tltrain.runs.report.formatting import percent
from tltrain.runs.report.stats import gain_interval

HEAD = "head"


@dataclass(frozen=True)
class Raced:
    """The chosen depth, the accuracy of each, and the sentence that says why."""

    chosen: str
    accuracy: Mapping[str, float]
    sentence: str


def choose_depth(right: Mapping[str, Mapping[str, float]], groups: Mapping[str, int] | None = None) -> Raced:
    """The shallowest depth that the best cannot be told from.

    right: name of a depth, shallow first, to image to whether it is right. Images that not all depths predicted are left out.
    groups: image to its group, where images of a group are alike. None or empty: each stands alone.
    """
    ids = sorted(set.intersection(*(set(each) for each in right.values())))
    answers = {name: np.array([each[i] for i in ids]) for name, each in right.items()}
    order, accuracy = list(answers), {name: float(answer.mean()) for name, answer in answers.items()}
    best = max(order, key=accuracy.__getitem__)  # of equal ones the shallowest
    group_N = np.array([groups[i] for i in ids]) if groups else None
    if group_N is not None and len(np.unique(group_N)) == len(ids):
        group_N = None
    low = {name: 0.0 if name == best else gain_interval(answers[name], answers[best], group_N).low for name in order}
    chosen = shallowest(order, best, low)
    return Raced(chosen, accuracy, _sentence(order, accuracy, best, chosen, len(ids)))


def shallowest(order: Sequence[str], best: str, low: Mapping[str, float]) -> str:
    """The shallowest depth that the best cannot be told from.

    order: the names, shallow first. low: the lower end of the interval of the best's lead over each, paired.
    """
    return next(name for name in order if name == best or low[name] <= 0)


def _sentence(order: list[str], accuracy: Mapping[str, float], best: str, chosen: str, num: int) -> str:
    each = ", ".join(f"{name} {percent(accuracy[name])}" for name in order)
    told = f"race on {num:,} images, each judged by a network that never saw it: {each}"
    if chosen == HEAD:
        pays = "training deeper does not pay here" if best == HEAD else "training deeper pays no more than luck would"
        return f"{told}; {pays}: the head alone"
    others = "" if chosen == best else f", which {best} leads by no more than luck would"
    return f"{told}; chosen: {chosen}{others}"
