"""The figures of a measurement: accuracies with intervals, what is lost, and the differences of two runs on the same corrupted images."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tltrain.core.errors import UserError
from tltrain.data.corruptions import KINDS, OPERATIONS, SEVERITIES
from tltrain.data.corruptions.views import CLEAN, Cell
from tltrain.evaluation.robustness.measured import Measured
from tltrain.runs.report.stats import Interval, accuracy_interval, gain_interval, sign_flips


@dataclass(frozen=True)
class Row:
    """One corruption, or all of them."""

    name: str
    by_severity: dict[int, Interval]
    """Accuracy of each severity that was measured."""
    mean: Interval
    """Of these severities. Images are resampled, each with all of its answers."""


@dataclass(frozen=True)
class Figures:
    """Of the cells that are shown."""

    num_images: int
    clean: Interval
    rows: Sequence[Row]
    overall: Row
    """Over all corruptions of `rows`, and by severity their mean."""
    num_groups: int | None = None
    """Of the images. None: each stands alone."""
    several: bool = False
    """Whether an image may have several labels, and is right where all of them are."""

    @property
    def right(self) -> str:
        """What the shares are of, as the head of a table."""
        return head_of_shares(self.several)


def head_of_shares(several: bool) -> str:
    """The head of a column of shares of images. several: whether an image has several labels, and is right where all of them are."""
    return "All labels right, %" if several else "Right, %"


def kind_of(name: str) -> str:
    return next(kind for kind, names in KINDS.items() if name in names)


def title(name: str) -> str:
    """A corruption as text: JPEG, Gaussian noise."""
    return {"jpeg": "JPEG"}.get(name, name.replace("_", " ").capitalize())


def figures(measured: Measured, cells: Sequence[Cell]) -> Figures:
    """cells: those to show, which were measured. Each corruption has the same severities in them."""
    shown = [cell for cell in cells if cell != CLEAN]
    rows = [_row(measured, name, [cell for cell in shown if cell.name == name]) for name in OPERATIONS if name in {c.name for c in shown}]
    overall = {s: _mean(measured, part) for s in SEVERITIES if (part := [cell for cell in shown if cell.severity == s])}
    clean = accuracy_interval(measured.right(CLEAN), measured.group)
    groups = None if measured.group is None else len(np.unique(measured.group))
    return Figures(len(measured.ids), clean, rows, Row("all", overall, _mean(measured, shown)), groups, measured.several)


def _row(measured: Measured, name: str, cells: Sequence[Cell]) -> Row:
    return Row(name, {cell.severity: accuracy_interval(measured.right(cell), measured.group) for cell in cells}, _mean(measured, cells))


def _mean(measured: Measured, cells: Sequence[Cell]) -> Interval:
    return accuracy_interval(share_right(measured, cells), measured.group)


def share_right(measured: Measured, cells: Sequence[Cell]) -> np.ndarray:
    """(N,) float64: in what share of these cells an image is answered right."""
    share_N: np.ndarray = np.mean([measured.right(cell) for cell in cells], axis=0)
    return share_N


@dataclass(frozen=True)
class Difference:
    """Accuracy of the first run minus that of the second, on the same images under one corruption in the same severities."""

    name: str
    first: float
    second: float
    gain: Interval
    p: float
    """Of the sign-flip test over images."""


def differences(first: Measured, second: Measured, cells: Sequence[Cell]) -> list[Difference]:
    """That of the clean images, of each corruption, and of all. Raises UserError if the images are not the same."""
    if sorted(first.ids) != sorted(second.ids):
        raise UserError(
            f"{first.folder.parent} and {second.folder.parent} are measured on other images; paired differences need the same ones "
            "(give both --data, or runs of one data set with the same data.seed)"
        )
    order_N = _order(first, second)
    shown = [cell for cell in cells if cell != CLEAN]
    names = [name for name in OPERATIONS if name in {cell.name for cell in shown}]
    parts = [("clean", [CLEAN]), *((name, [c for c in shown if c.name == name]) for name in names), ("all", shown)]
    return [_difference(name, share_right(first, part), share_right(second, part)[order_N], first.group) for name, part in parts]


PIXELS = {"seed": "data.seed", "size": "data.size", "resize": "data.resize", "interpolation": "interpolation", "version": "version"}
"""What the pixels of a corrupted image depend on, beside the image: in `Measured.about`, and as a user knows it."""


def unlike(first: Measured, second: Measured) -> str:
    """In what the same corruption of the same image differs for two measurements. Empty if the pixels are the same."""
    differs = [(name, first.about.get(key), second.about.get(key)) for key, name in PIXELS.items()]
    return ", ".join(f"{name} {one} and {other}" for name, one, other in differs if one != other)


def _order(first: Measured, second: Measured) -> np.ndarray:
    """(N,) where each image of the first stands in the second."""
    at = {name: i for i, name in enumerate(second.ids)}
    return np.array([at[name] for name in first.ids], dtype=np.int64)


def _difference(name: str, first_N: np.ndarray, second_N: np.ndarray, group_N: np.ndarray | None) -> Difference:
    p = sign_flips(first_N, second_N, group_N=group_N)[2]
    return Difference(name, float(first_N.mean()), float(second_N.mean()), gain_interval(second_N, first_N, group_N), p)


def table(measured: Measured, cells: Sequence[Cell]) -> bytes:
    """figures.csv: a line for each pass. Shares are fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["kind", "corruption", "severity", "n", "accuracy", "low", "high"])
    for cell in cells:
        ends = (f"{value:.6f}" for value in accuracy_interval(measured.right(cell), measured.group))
        writer.writerow(["" if cell == CLEAN else kind_of(cell.name), *cell, len(measured.ids), *ends])
    return text.getvalue().encode()
