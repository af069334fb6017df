"""What a comparison of runs rests on: figures with intervals, groups of seeds, paired differences, and where recipes differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as scipy_stats

from tltrain.runs.record import Predicted, RunRecord, number, read_predictions
from tltrain.runs.report.stats import bootstrap, f1_macro, gain, mcnemar, wilson

SEEDS = {"seed", "data.seed"}
"""What may differ within a group."""
UNLEARNED = {"version", "name", "purpose"}


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison."""

    name: str
    run: RunRecord
    predicted: Predicted | None
    accuracy: Interval | None
    """None where the run has no test figures."""
    f1: Interval | None
    """None where it has no predictions either."""

    @property
    def device_seconds(self) -> float:
        """Seconds times processes."""
        return self.run.seconds * int((self.run.env.get("accelerate") or {}).get("processes", 1))

    @property
    def peak_bytes(self) -> float:
        """Most memory that one process held, of its device where that is a GPU; NaN where it is not known."""
        return number(self.run.outcome or {}, "peak_bytes")


def compared_run(name: str, run: RunRecord) -> ComparedRun:
    """Intervals are bootstrap intervals; where every image is right or wrong, which they take for certain, Wilson's."""
    if run.test is None:
        return ComparedRun(name, run, None, None, None)
    predicted, share, n = read_predictions(run.path), number(run.test, "top1"), int(run.test["n"])
    if predicted is None:
        return ComparedRun(name, run, None, Interval(share, *wilson(share, n)), None)
    sure = predicted.right.all() or not predicted.right.any()
    ends = wilson(share, n) if sure else bootstrap(_share, predicted.right)
    f1 = bootstrap(f1_macro, predicted.label, predicted.predicted) if not sure else ends
    return ComparedRun(name, run, predicted, Interval(share, *ends), Interval(number(run.test, "f1_macro"), *f1))


def _share(right: np.ndarray, axis: int = -1) -> np.ndarray:
    return right.mean(axis)


@dataclass(frozen=True)
class Paired:
    """Two runs on the same test images."""

    first: ComparedRun
    second: ComparedRun
    only_first: int
    only_second: int
    p: float
    """McNemar's exact test."""
    gain: Interval
    """How much larger a share the first gets right; the images are resampled, each with both answers."""


def paired(first: ComparedRun, second: ComparedRun) -> Paired | None:
    """None where they were not tested on the same images."""
    a, b = first.predicted, second.predicted
    if a is None or b is None or a.samples != b.samples:
        return None
    only_first, only_second, p = mcnemar(a.right, b.right)
    value = float(gain(b.right, a.right))
    ends = bootstrap(gain, b.right, a.right) if only_first + only_second else (0.0, 0.0)
    return Paired(first, second, only_first, only_second, p, Interval(value, *ends))


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in their seeds alone."""

    name: str
    entries: tuple[ComparedRun, ...]

    @property
    def accuracies(self) -> np.ndarray:
        """(n,) of the runs that were tested."""
        return np.array([e.accuracy.value for e in self.entries if e.accuracy is not None])

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean()) if len(self.accuracies) else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; NaN for fewer than two."""
        return float(self.accuracies.std(ddof=1)) if len(self.accuracies) > 1 else math.nan


def grouped(entries: Sequence[ComparedRun]) -> list[Group]:
    """Groups in the order in which their first run stands; a group is called as its recipe, or, where two share that name, by its runs."""
    found: dict[tuple[str, int], list[ComparedRun]] = {}
    seen: Counter[str] = Counter()
    for e in entries:
        flat = e.run.recipe.flat()
        key = repr({k: v for k, v in flat.items() if k not in SEEDS | UNLEARNED})
        seeds = f"{key} {[flat[k] for k in sorted(SEEDS)]}"
        found.setdefault((key, seen[seeds]), []).append(e)  # the same seed again is no other seed
        seen[seeds] += 1
    names = [members[0].run.recipe.name for members in found.values()]
    return [
        Group(_called(members, name if names.count(name) == 1 else None), tuple(members))
        for name, members in zip(names, found.values(), strict=True)
    ]


def _called(members: Sequence[ComparedRun], recipe: str | None) -> str:
    first, num_others = members[0].name, len(members) - 1
    return first if num_others == 0 else recipe or f"{first} and {num_others} more"


def welch(first: Group, second: Group) -> tuple[Interval, float] | None:
    """(the difference of the mean accuracies with its interval over seeds, p), by Welch's t; None with fewer than two seeds each."""
    a, b = first.accuracies, second.accuracies
    if min(len(a), len(b)) < 2 or a.std() + b.std() == 0:
        return None
    test = scipy_stats.ttest_ind(a, b, equal_var=False)
    ends = test.confidence_interval(0.95)
    return Interval(first.mean - second.mean, float(ends.low), float(ends.high)), float(test.pvalue)


def differing(groups: Sequence[Group]) -> list[tuple[str, list[Any]]]:
    """(path of a recipe's value, what each group has there) for each value that is not the same in all; ... where one has no such value."""
    flat = [group.entries[0].run.recipe.flat() for group in groups]
    paths = dict.fromkeys(path for values in flat for path in values if path not in SEEDS | UNLEARNED)
    rows = [(path, [values.get(path, ...) for values in flat]) for path in paths]
    return [(path, values) for path, values in rows if any(v != values[0] for v in values)]
