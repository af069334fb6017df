"""Compares runs: metrics with intervals, groups of seeds, paired differences, and differences between recipes."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from tltrain.runs.record import Predicted, RunRecord, number, read_predictions
from tltrain.runs.report.stats import Interval, accuracy_interval, ends_of, f1_interval, gain_interval, mcnemar, sign_flips

SEEDS = {"seed", "data.seed"}
"""Recipe values that may differ within a group."""
UNLEARNED = {"version", "name", "purpose"}
"""Recipe values that do not affect training."""


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison."""

    name: str
    run: RunRecord
    predicted: Predicted | None
    accuracy: Interval | None
    """Test accuracy; None if the run has no test metrics."""
    f1: Interval | None
    """Macro F1; None if the run has no test predictions."""
    page: str = "report.html"
    """Its own page, in its folder."""
    is_folds: bool = False
    """Whether it is a cross-validation: its figures are those of all images, each judged by networks that never saw it."""

    @property
    def device_seconds(self) -> float:
        """Seconds of training times number of processes."""
        return self.run.seconds * int((self.run.env.get("accelerate") or {}).get("processes", 1))

    @property
    def peak_bytes(self) -> float:
        """Largest peak memory of a process in bytes (GPU memory on a GPU, else host memory); NaN if unknown."""
        return number(self.run.outcome or {}, "peak_bytes")


def compared_run(name: str, run: RunRecord) -> ComparedRun:
    """A run with its metrics and their intervals, as every page shows them (`tltrain.runs.report.stats`)."""
    if run.test is None:
        return ComparedRun(name, run, None, None, None)
    several = run.recipe.data.multilabel  # then an image is right where all of its labels are
    predicted, share, n = read_predictions(run.path), number(run.test, "subset_accuracy" if several else "top1"), int(run.test["n"])
    ends = (run.test.get("intervals") or {}).get("f1_macro")  # of several labels
    of_labels = None if ends is None else Interval(number(run.test, "f1_macro"), *ends)
    if predicted is None:
        return ComparedRun(name, run, None, Interval(share, *ends_of(run.test, share, n)), of_labels)
    accuracy = accuracy_interval(predicted.right, predicted.group)
    if several:
        return ComparedRun(name, run, predicted, accuracy._replace(value=share), of_labels)
    f1 = f1_interval(predicted.label, predicted.predicted, group_N=predicted.group)
    return ComparedRun(name, run, predicted, accuracy._replace(value=share), f1._replace(value=number(run.test, "f1_macro")))


@dataclass(frozen=True)
class Paired:
    """Two runs on the same test images."""

    first: ComparedRun
    second: ComparedRun
    only_first: int
    only_second: int
    p: float
    """p of the test."""
    gain: Interval
    """Accuracy of the first minus that of the second, with a paired bootstrap interval over images."""
    test: str = "exact McNemar test"
    """The test that gave p."""
    once: bool = True
    """Whether each image was judged once, not several times."""


def paired(first: ComparedRun, second: ComparedRun) -> Paired | None:
    """Compare two runs on their test images. None if they were not tested on the same images."""
    a, b = first.predicted, second.predicted
    if a is None or b is None or a.samples != b.samples:
        return None
    once = a.right.dtype == b.right.dtype == np.bool_  # one prediction an image, not the share of several
    if once and a.group is None:
        (only_first, only_second, p), test = mcnemar(a.right, b.right), Paired.test
    else:
        only_first, only_second, p = sign_flips(a.right, b.right, group_N=a.group)
        test = f"sign-flip test over {'images' if a.group is None else 'groups of images'}"
    return Paired(first, second, only_first, only_second, p, gain_interval(b.right, a.right, a.group), test, once)


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ only in their seeds."""

    name: str
    entries: tuple[ComparedRun, ...]

    @property
    def accuracies(self) -> np.ndarray:
        """(n,): test accuracies of the runs that were tested."""
        return np.array([e.accuracy.value for e in self.entries if e.accuracy is not None])

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean()) if len(self.accuracies) else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; NaN for fewer than two runs."""
        return float(self.accuracies.std(ddof=1)) if len(self.accuracies) > 1 else math.nan


def grouped(entries: Sequence[ComparedRun]) -> list[Group]:
    """Group runs by recipe, in the order of their first runs.

    A group has its recipe's name. If two groups share that name, each is named after its runs: by the parts of their names that all of
    its runs have, such as lr-1e-3 of seed-0_lr-1e-3 and seed-1_lr-1e-3, else by its first run.
    """
    groups: dict[tuple[str, int], list[ComparedRun]] = {}
    seen: Counter[str] = Counter()
    for e in entries:
        flat = e.run.recipe.flat()
        key = repr({k: v for k, v in flat.items() if k not in SEEDS | UNLEARNED})
        seeds = f"{key} {[flat[k] for k in sorted(SEEDS)]}"
        groups.setdefault((key, seen[seeds]), []).append(e)  # a repeated seed starts another group
        seen[seeds] += 1
    names = [members[0].run.recipe.name for members in groups.values()]
    shared = [_shared(members) for members in groups.values()]
    return [
        Group(_group_name(members, name if names.count(name) == 1 else part if shared.count(part) == 1 else ""), tuple(members))
        for name, part, members in zip(names, shared, groups.values(), strict=True)
    ]


def _group_name(members: Sequence[ComparedRun], name: str) -> str:
    first, num_others = members[0].name, len(members) - 1
    return first if num_others == 0 else name or f"{first} and {num_others} more"


def _shared(members: Sequence[ComparedRun]) -> str:
    """The parts between underscores that the names of all members have."""
    others = [set(e.name.split("_")) for e in members[1:]]
    return "_".join(part for part in members[0].name.split("_") if all(part in parts for parts in others))


def welch(first: Group, second: Group) -> tuple[Interval, float] | None:
    """Welch's t-test over seeds: (difference of the mean accuracies with its interval, p). None with fewer than two seeds each."""
    a, b = first.accuracies, second.accuracies
    if min(len(a), len(b)) < 2 or a.std() + b.std() == 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # SciPy warns where all seeds of one of them are equally good
        test = scipy_stats.ttest_ind(a, b, equal_var=False)
    ends = test.confidence_interval(0.95)
    return Interval(first.mean - second.mean, float(ends.low), float(ends.high)), float(test.pvalue)


def differing(groups: Sequence[Group]) -> list[tuple[str, list[Any]]]:
    """(path of a recipe value, its value in each group) for each path where groups differ. `...` marks a group without that path."""
    flat = [group.entries[0].run.recipe.flat() for group in groups]
    paths = dict.fromkeys(path for values in flat for path in values if path not in SEEDS | UNLEARNED)
    rows = [(path, [values.get(path, ...) for values in flat]) for path in paths]
    return [(path, values) for path, values in rows if any(v != values[0] for v in values)]
