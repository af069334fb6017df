"""Formats numbers, and puts a run's result into one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tltrain.core.metric import metric
from tltrain.runs.record import RunRecord, number
from tltrain.runs.report.stats import ends_of

DASH = "\u2013"
_TOO_FEW = "There are too few test images to tell"
_SPACE = "\u202f"  # narrow, and does not break


def percent(share: float, digits: int = 1) -> str:
    """.9123 as 91.2 %. A share below 1 is never rounded up to 100 %."""
    if not math.isfinite(share):
        return DASH
    shown = min(100 * share, 100 - 10.0**-digits) if share < 1 else 100 * share
    return f"{shown:.{digits}f}{_SPACE}%"


def tenths(share: float) -> str:
    """Like `percent` but without the unit, for columns whose heading names it."""
    return percent(share).removesuffix(f"{_SPACE}%")


def interval(share: float, n: int, of: Mapping[str, Any] | None = None) -> str:
    """The 95 % interval as 87.8 to 93.7 %. of: what was counted (`stats.ends_of`)."""
    return ends(*ends_of(of or {}, share, n))


def ends(low: float, high: float) -> str:
    """An interval of a share as 87.8 to 93.7 %."""
    return f"{100 * low:.1f}\u00a0to\u00a0{100 * high:.1f}{_SPACE}%"


def grouped(test: Mapping[str, Any]) -> str:
    """` in 12 groups`, behind a number of test images. Empty where each stands alone."""
    return f" in {plural(int(test['groups']), 'group')}" if "groups" in test else ""


def intervals(test: Mapping[str, Any]) -> str:
    """The sentence that explains the intervals of a run's test."""
    means = "means over labels" if "per_label" in test else "F1"
    if "per_label" in test and not test.get("intervals"):  # of an older version, or of too many answers
        means = ""
    how = f"Wilson's for a share of them{f', the bootstrap over images for {means}' if means else ''}."
    if "groups" in test:
        f1 = f", the bootstrap over groups for {means}" if means else ""
        how = (
            f"they lie in {plural(int(test['groups']), 'group')} of images that are alike, such as those of one patient, and intervals are "
            f"as wide as that makes them (Wilson's for as many images as the groups are worth{f1})."
        )
    return f"95{_SPACE}% intervals count the luck of these test images: {how} They do not count the luck of the seed."


def decimal(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else DASH


def points(difference: float) -> str:
    """A difference of two shares, .011 as 1.1 points."""
    return f"{100 * difference:.1f}\u00a0points" if math.isfinite(difference) else DASH


def signed(difference: float) -> str:
    """A difference of two shares in points, with a sign as wide as the plus: .011 as +1.1. What rounds to 0 has none."""
    shown = f"{100 * difference:+.1f}"
    return "0.0" if shown in ("+0.0", "-0.0") else shown.replace("-", "\u2212")


def memory(num_bytes: float) -> str:
    """1.5 GB."""
    if not math.isfinite(num_bytes):
        return DASH
    return f"{num_bytes / 1e9:.3g}{_SPACE}GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g}{_SPACE}MB"


def count(n: int) -> str:
    return f"{n:,}"


def plural(n: int, word: str) -> str:
    return f"{count(n)} {word}" if n == 1 else f"{count(n)} {word}{'es' if word.endswith('s') else 's'}"


def finished_of(num: int, total: int) -> str:
    """1 of 3 runs is finished; 2 of 3 runs are finished."""
    return f"{count(num)} of {plural(total, 'run')} {'is' if num == 1 else 'are'} finished"


def compact(value: float) -> str:
    """1500 as 1.5k, for axis ticks."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """48 s, 3 min 20 s, 1 h 05 min."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 10:
        return f"{seconds:.1f}{_SPACE}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{_SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{_SPACE}min {whole % 60:02d}{_SPACE}s"
    return f"{whole // 3600}{_SPACE}h {whole % 3600 // 60:02d}{_SPACE}min"


def metric_name(name: str) -> str:
    """A metric's title, or its key if it has none."""
    return metric(name).title or name


def metric_value(name: str, value: float) -> str:
    return percent(value) if metric(name).is_share else decimal(value)


def confusions(matrix: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """(count, true class, predicted class) of every cell off the diagonal that is not 0, the most frequent first."""
    cells = [(n, t, p) for t, row in enumerate(matrix) for p, n in enumerate(row) if n and t != p]
    return sorted(cells, key=lambda c: (-c[0], c[1], c[2]))


def verdict(run: RunRecord) -> str:
    """The result of a run in one sentence, with a 95 % interval."""
    if run.recipe.data.multilabel:
        return _labels_verdict(run)
    if run.test is not None:
        return _test_verdict(run)
    best = run.best
    if best is None:
        return f"{_ending(run)}; nothing has been evaluated yet."
    share, n = number(best, "top1"), int(best["n"])
    seen = f"{percent(share)} of {plural(n, 'val image')} are right (95{_SPACE}% interval {interval(share, n)})"
    if ended(run) == "finished":
        return f"{seen}. There is no test split, and the weights were chosen on these images: expect a little less."
    return f"{_ending(run)}. With the best weights so far {seen}."


def _labels_verdict(run: RunRecord) -> str:
    """`verdict` of several labels an image."""
    row, split = (run.best, "val") if run.test is None else (run.test, "test")
    if row is None:
        return f"{_ending(run)}; nothing has been evaluated yet."
    share, n = number(row, "subset_accuracy"), int(row["n"])
    head = f"mAP is {percent(number(row, 'map'))}; all labels are right on {percent(share)} of {plural(n, f'{split} image')}"
    head = f"{head} (95{_SPACE}% interval {interval(share, n, run.test)})."
    if run.test is not None:
        return f"{head} {nothing}" if (nothing := learned_nothing(run.test)) is not None else head
    if ended(run) == "finished":
        return f"{head} There is no test split, and the weights were chosen on these images: expect a little less."
    return f"{_ending(run)}. With the best weights so far: {head}"


def ended(run: RunRecord) -> str:
    """The outcome in one word; `unfinished` for a run that still trains or was killed."""
    return "unfinished" if run.outcome is None else str(run.outcome["outcome"])


def _ending(run: RunRecord) -> str:
    endings = {"finished": "The run finished", "failed": "The run failed", "unfinished": "The run has not finished"}
    how = endings.get(ended(run), f"The run was {ended(run)}")
    row = next((row for row in reversed(run.rows) if row["kind"] != "teacher"), None)
    if row is None:
        return how
    where = f"step {row['step']} of stage {row['stage']}"
    return f"The run has come to {where}" if ended(run) == "unfinished" else f"{how} after {where}"


def learned_nothing(test: Mapping[str, Any]) -> str | None:
    """A warning with remedies if the accuracy cannot be told from always naming the most frequent class. Else None.

    test: what test_metrics.json holds. Of several labels: where their order cannot be told from a random one.
    """
    if "per_label" in test:
        return _labels_learned_nothing(test)
    support = [sum(row) for row in test["confusion"]]
    largest = max(range(len(support)), key=support.__getitem__)
    share = support[largest] / int(test["n"])
    if ends_of(test, float(test["top1"]), int(test["n"]))[0] > share:
        return None
    if test["top1"] > share >= ends_of({}, 1.0, int(test["n"]))[0]:
        return f"{_TOO_FEW} this from always saying {test['classes'][largest]}, which is right for {percent(share)}."
    return (
        f"This cannot be told from always saying {test['classes'][largest]}, which is right for {percent(share)}: nothing that was learned "
        "shows on these images. Try more steps or a higher lr for the head, or look at the images and labels (tltrain preview)."
    )


def _labels_learned_nothing(test: Mapping[str, Any]) -> str | None:
    """`learned_nothing` of several labels: by the interval of the mean AUROC.

    Older runs kept none: then by the spread without skill, which is at most the labels' (Mann and Whitney 1947). Where even a perfect
    order would lie within that, there are too few images.
    """
    pairs = [(number(row, "auroc"), int(row["support"]), int(test["n"]) - int(row["support"])) for row in test["per_label"]]
    known = [(auroc, math.sqrt((with_ + without + 1) / (12 * with_ * without))) for auroc, with_, without in pairs if with_ and without]
    if not known:
        return None
    mean, doubt = sum(auroc for auroc, _ in known) / len(known), 1.96 * sum(spread for _, spread in known) / len(known)
    if mean > 0.5 and doubt >= 0.5:
        return f"{_TOO_FEW} the labels' order from a random one (AUROC {percent(mean)}, of a random one {percent(0.5, 0)})."
    low = ((test.get("intervals") or {}).get("auroc_macro") or [mean - doubt])[0]
    if low > 0.5:
        return None
    return (
        f"The labels cannot be told from a random order (AUROC {percent(mean)}, of a random one "
        f"{percent(0.5, 0)}): nothing that was learned shows on these images. Try more steps or a higher lr for the head, or look at the "
        "images and labels (tltrain preview)."
    )


def _test_verdict(run: RunRecord) -> str:
    assert run.test is not None
    share, n = number(run.test, "top1"), int(run.test["n"])
    classes = run.test["classes"]
    images, ends = f"{plural(n, 'test image')}{grouped(run.test)}", interval(share, n, run.test)
    head = f"{percent(share)} of {images} are right (95{_SPACE}% interval {ends})"
    if (nothing := learned_nothing(run.test)) is not None:
        return f"{head}. {nothing}"
    wrong = confusions(run.test["confusion"])
    if not wrong:
        return f"All of {images} are right (95{_SPACE}% interval {ends})."
    times, true, predicted = wrong[0]
    total = sum(cell[0] for cell in wrong)
    if total == 1:
        return f"{head}; the one mistake takes {classes[true]} for {classes[predicted]}."
    if times * 2 > total:
        return f"{head}; most mistakes take {classes[true]} for {classes[predicted]} ({times}\u00a0of\u00a0{total})."
    if times > 1 and (len(wrong) == 1 or wrong[1][0] < times):
        return f"{head}; the most frequent mistake takes {classes[true]} for {classes[predicted]} ({times}\u00a0of\u00a0{total})."
    return f"{head}; no mistake stands out."
