"""Probes backbones, image sizes and heads within a time limit. All see the same images: as many of each class as the time allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from tltrain.analysis.at_hand import Candidate
from tltrain.analysis.features import FeatureBank
from tltrain.analysis.probe.judge import Ask, Probed, grouped, probe, recipe_of
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console, duration
from tltrain.data import DataSplits, class_counts
from tltrain.data.dataset import class_weights
from tltrain.data.splits import folds
from tltrain.evaluation.multilabel.judged import Judged, by_logits
from tltrain.fitting.facts import UNEVEN, Facts
from tltrain.fitting.timing import Network, network_of
from tltrain.heads.cost import neighbours_s, solve_s
from tltrain.heads.out_of_fold import out_of_fold
from tltrain.heads.solve import Kind
from tltrain.runs.report.formatting import percent
from tltrain.runs.report.stats import bootstrap, f1_macro

K = 5
"""Folds of the probe."""
LEAST_PROBED = 20
"""Fewest images of each class for a probe that means something."""
SMALLER, LARGER = 0.72, 1.28
"""Other sizes that are tried, times that of the weights: 160 and 288 for 224. Networks like larger images than they learned on (Touvron
et al. 2019), and smaller ones cost half."""
LOSS = 0.01
"""Largest accuracy loss of a smaller size, at the lower end of its 95 % interval."""
LEAST_SIZED = 300
"""Images that are looked at from which a smaller size is tried: one that loses none of fewer may still cost a point (3 of 300, at 95 %)."""
MULTIPLE = 16
"""Pixels that a size is a multiple of: patches of transformers, and most of the strides of others."""


@dataclass(frozen=True)
class Bounded:
    """The part of a probe that fits into the time."""

    names: tuple[str, ...]
    """Backbones to probe."""
    per_class: int | None
    """Training images of each class at most. None: all images of train and val."""
    seconds: float
    """Estimated."""
    beyond: str
    """What more time would probe, as a sentence. Empty: nothing."""


def bounded(seconds_of: dict[str, Callable[[int], float]], counts: Sequence[int], num_all: int, left_s: float) -> Bounded:
    """How much of a probe fits into `left_s` seconds: more backbones come before more images.

    seconds_of: name to estimated seconds for so many images. counts: training images of each class, or with each label. num_all: of train
    and val.
    The cheapest backbone is always looked at, with LEAST_PROBED images of each class at least.
    """
    least = min(num_all, _of(counts, LEAST_PROBED))
    names, beyond, spent_s = list[str](), list[str](), 0.0
    for name in sorted(seconds_of, key=lambda name: seconds_of[name](least)):
        cost_s = seconds_of[name](least)
        if names and spent_s + cost_s > left_s:
            beyond.append(f"{name} ({duration(cost_s)} for {least:,} images)")
            continue
        names.append(name)
        spent_s += cost_s

    def total_s(num: int) -> float:
        return sum(seconds_of[name](num) for name in names)

    kept = tuple(name for name in seconds_of if name in names)
    if total_s(num_all) <= left_s or max(counts) <= LEAST_PROBED:
        return Bounded(kept, None, total_s(num_all), _beyond(beyond, left_s))
    fits = (n for n in _steps(max(counts)) if n <= LEAST_PROBED or total_s(_of(counts, n)) <= left_s)
    per_class = next(fits, LEAST_PROBED)
    beyond.append(f"all {num_all:,} images ({duration(total_s(num_all))})")
    return Bounded(kept, per_class, total_s(_of(counts, per_class)), _beyond(beyond, left_s))


def _beyond(each: list[str], left_s: float) -> str:
    return f"more --minutes look at {', '.join(each)}; here it may take {duration(left_s)}" if each else ""


def _steps(most: int) -> Iterator[int]:
    """Round numbers of images per class, descending. Round, so that a slightly slower machine makes the same choice."""
    rounds = [lead * 10**k for k in range(7) for lead in (1, 2, 5)]
    return iter([n for n in reversed(rounds) if LEAST_PROBED <= n < most])


def _of(counts: Sequence[int], per_class: int) -> int:
    """So many images at most: of several labels, one is counted with each of its own."""
    return sum(min(n, per_class) for n in counts)


def per_class_for(counts: Sequence[int], share: float) -> int:
    """The largest round number of images per class that keeps at most this share of all images."""
    return next((n for n in _steps(max(counts)) if _of(counts, n) <= share * sum(counts)), LEAST_PROBED)


def probe_in_time(
    ask: Ask, candidates: Sequence[Candidate], images: DataSplits, start: RunFlags, console: Console, left_s: float
) -> tuple[Probed, Bounded]:
    """Probe the backbones within `left_s` seconds. Raises UserError where none can be probed."""
    num_all = len(images.train) + (0 if images.val is None else len(images.val))
    costs = {each.name: _cost(network, len(images.classes)) for each in candidates if (network := _network(ask, each, images, start))}
    problems = [each for each in candidates if each.name not in costs]
    if not costs:
        return probe(ask, candidates, start, console), Bounded((), None, 0.0, "")
    limit = bounded(costs, class_counts(images.train.labels, len(images.classes)).tolist(), num_all, left_s)
    if limit.beyond:
        console.say(f"probe   {limit.beyond}", style="yellow")
    known = [each for each in candidates if each.name in limit.names] + problems
    return probe(replace(ask, per_class=limit.per_class), known, start, console), limit


def _network(ask: Ask, candidate: Candidate, images: DataSplits, start: RunFlags) -> Network | None:
    """The timed network of a candidate. None for one that cannot be built: the probe reports why."""
    try:
        return network_of(recipe_of(ask, candidate), images, start, with_cuts=False)
    except UserError:
        return None


def _cost(network: Network, num_classes: int) -> Callable[[int], float]:
    """A function from a number of images to the seconds of a probe: features, a head for each fold, neighbours."""

    def seconds(num: int) -> float:
        head_s = solve_s("ridge", num - num // K, network.num_features, num_classes)
        return num * network.image_s + K * head_s + neighbours_s(num, network.num_features)

    return seconds


@dataclass(frozen=True)
class Sized:
    """The chosen image size and crop, and why."""

    size: int | None
    """Pixels. None: no other than that of the weights was tried."""
    why: str
    judged: Judged
    """How right the head is at this size, out of fold."""
    resize: int | None = None
    """Shorter side before the crop, pixels: the size itself, so that the whole of it is seen. None: the crop of the weights."""
    why_resize: str = ""


def sizes_to_try(own: int, side: int, num: int) -> list[int]:
    """Other sizes than that of the weights, pixels. side: of the pictures, which larger sizes must not blow up. num: images looked at."""
    smaller, larger = (round(own * times / MULTIPLE) * MULTIPLE for times in (SMALLER, LARGER))
    tried = [smaller] if smaller >= 2 * MULTIPLE and num >= LEAST_SIZED else []
    return [*tried, larger] if larger <= side else tried


def probe_sizes(
    ask: Ask, candidate: Candidate, own: Probed, images: DataSplits, network: Network, side: int, start: RunFlags, console: Console,
    left_s: float,
) -> Sized:  # fmt: skip
    """Probe a backbone without its crop, then at other sizes, as far as `left_s` seconds allow. own: its probe as its weights have it.

    network: at the weights' size. side: the median side of the pictures, pixels.
    """
    beyond: list[str] = []

    def judged_at(size: int, resize: int | None, name: str) -> Judged | None:
        nonlocal left_s
        asked = replace(ask, size=size, resize=resize, per_class=own.ask.per_class)
        if (other := _network(asked, candidate, images, start)) is None:
            return None  # it takes no other size
        if (cost_s := _cost(other, own.num_classes)(own.num_images)) > left_s:
            beyond.append(f"{name} ({duration(cost_s)})")
            console.say(f"left    {beyond[-1]} beside {network.size} px; more --minutes try it", style="yellow")
            return None
        left_s -= cost_s
        console.say(f"size    {name} beside {network.size} px")
        try:
            return probe(asked, [candidate], start, console).rows[0].judged
        except UserError as error:
            console.say(f"left    {name}: {error}", style="yellow")
            return None

    cropped = next(row for row in own.rows if row.backbone == candidate.name).judged
    whole = judged_at(network.size, network.size, "the whole picture") if network.resize > network.size else None
    is_whole, why_crop = choose_crop(cropped, whole)
    judged = {network.size: cropped if whole is None or not is_whole else whole}
    for size in sizes_to_try(network.size, side, own.num_images):
        if (found := judged_at(size, size if is_whole else None, f"{size} px")) is not None:
            judged[size] = found
    chosen = choose_size(judged, network.size, f"; more --minutes try {', '.join(beyond)}" if beyond else "")
    if not is_whole:
        return chosen
    size, why = chosen.size or network.size, chosen.why or "that of the weights"
    return replace(chosen, size=size, why=why, resize=size, why_resize=why_crop)


def choose_crop(cropped: Judged, whole: Judged | None) -> tuple[bool, str]:
    """(whether the whole picture is seen rather than the middle that the weights' crop leaves, and why). It costs the same: the more right.

    Both out of fold. whole: None where it was not tried.
    """
    if whole is None or whole.value <= cropped.value:
        return False, ""
    luck = "" if whole.lead(cropped).low > 0 else ", which may be luck, but costs nothing"
    return True, f"no crop at the shorter side: {whole.shown} out of fold, {cropped.shown} with the crop of the weights{luck}"


def choose_size(judged: dict[int, Judged], own: int, beyond: str = "") -> Sized:
    """The smallest size that costs no more than LOSS against that of the weights, unless a larger one leads by more than luck.

    judged: size to how right the head is, out of fold, on the same images.
    """
    sizes = sorted(judged)
    told = f"out of fold {', '.join(f'{judged[size].shown} at {size} px' for size in sizes)}"
    if len(sizes) == 1:
        return Sized(None, "", judged[own])
    chosen = next(size for size in sizes if size == own or (size < own and judged[size].lead(judged[own]).low >= -LOSS))
    cost = judged[chosen].lead(judged[own]).low
    why = "that of the weights" if chosen == own else f"cheaper, and {percent(max(0.0, -cost))} worse at the most (95\u202f%)"
    larger = max((size for size in sizes if size > own), key=lambda size: judged[size].value, default=None)
    if larger is not None and judged[larger].lead(judged[chosen]).low > 0:
        chosen, why = larger, "more by more than luck"
    return Sized(chosen, f"{told}: {why}{beyond}", judged[chosen])


@dataclass(frozen=True)
class Heads:
    """The chosen kind of head, and why."""

    kind: Kind
    why: str
    balanced: bool
    """Whether its images are weighted, so that classes count alike."""
    why_balance: str
    """Empty where the classes are about even, and weights were not tried."""
    ids: tuple[str, ...]
    """(N,) ids of the probed images."""
    right: np.ndarray
    """(N,) whether each is predicted right, out of fold."""


def choose_head(bank: FeatureBank, by_ridge: Judged, facts: Facts, left_s: float, seed: int) -> Heads:
    """Ridge, unless logistic regression leads by more than luck; without class weights, unless they raise macro F1 by more than luck.

    by_ridge: how right ridge is, which the probe has judged already. left_s: seconds for each of the two questions. Of several labels no
    head is weighted, since an image would have a weight for each.
    """
    num, num_columns, num_classes = len(bank.labels), bank.features().shape[1], len(bank.classes)
    tried_s, used_s = (solve_s("logistic", rows, num_columns, num_classes) for rows in (num - num // K, facts.train))
    kind: Kind = "ridge"
    judged, why = by_ridge, f"worked out, not trained: {by_ridge.shown} out of fold"
    if max(K * tried_s, used_s) > left_s:
        why += f"; logistic would take {duration(K * tried_s)} to compare and {duration(used_s)} to work out"
    else:
        other = by_logits(_out_of_fold_logits(bank, "logistic", seed).numpy(), bank.labels, grouped(bank))
        kind, why = preferred(by_ridge, other)
        judged = other if kind == "logistic" else by_ridge
    if facts.several or facts.ratio <= UNEVEN:
        return Heads(kind, why, False, "", bank.ids, judged.right)
    if (balance_s := 2 * K * solve_s(kind, num, num_columns, num_classes)) > left_s:
        return Heads(kind, why, False, f"weights of classes would take {duration(balance_s)} to try", bank.ids, judged.right)
    weight_N = class_weights(bank.labels, num_classes)[bank.labels]
    plain_N, weighted_N = (_out_of_fold_logits(bank, kind, seed, each).argmax(1).numpy() for each in (None, weight_N))
    balanced, why_balance = balance(bank.labels, plain_N, weighted_N, facts)
    return Heads(kind, why, balanced, why_balance, bank.ids, (weighted_N if balanced else plain_N) == bank.labels)


def preferred(by_ridge: Judged, by_logistic: Judged) -> tuple[Kind, str]:
    """(the kind of head, and why). Both out of fold."""
    gain, ridge, logistic = by_logistic.lead(by_ridge), by_ridge.shown, by_logistic.shown
    if gain.low > 0:
        return "logistic", f"worked out, not trained: {logistic} out of fold, ridge {ridge}"
    luck = ", which may be luck" if gain.value > 0 else ""
    return "ridge", f"worked out, not trained: {ridge} out of fold, logistic {logistic}{luck}"


def balance(label_N: np.ndarray, plain_N: np.ndarray, weighted_N: np.ndarray, facts: Facts) -> tuple[bool, str]:
    """(whether to weight classes, and why). plain_N, weighted_N: (N,) the classes that heads without and with weights name, out of fold."""

    def gained(label: np.ndarray, plain: np.ndarray, weighted: np.ndarray, axis: int = -1) -> np.ndarray:
        return f1_macro(label, weighted) - f1_macro(label, plain)

    without, with_weights = (percent(float(f1_macro(label_N, each))) for each in (plain_N, weighted_N))
    pays = (plain_N != weighted_N).any() and bootstrap(gained, label_N, plain_N, weighted_N)[0] > 0
    told = f"{facts.largest} has {facts.ratio:.1f} times as many images as {facts.smallest}; with weights macro F1 out of fold is "
    return bool(pays), f"{told}{with_weights}, without {without}: {'more by more than luck' if pays else 'no more than luck would give'}"


def _out_of_fold_logits(bank: FeatureBank, kind: Kind, seed: int, weight_N: np.ndarray | None = None) -> Tensor:
    """Out-of-fold logits (N, K), with the folds of the probe."""
    fold_N = folds(bank.labels, bank.groups, K, seed)
    return out_of_fold(kind, bank.features(), bank.labels, fold_N, len(bank.classes), weight_N=weight_N, group_N=grouped(bank), seed=seed)
