"""Draws preview.png: training images as the network sees them. Each row is a sample, each column a view of a stage."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tltrain.core.output import escape
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits, Split
from tltrain.data.mixing import apply_mixup, stage_views
from tltrain.data.multilabel.label_sets import written
from tltrain.data.sampler import SampleRef, SampleStream
from tltrain.data.views import Preprocess, Views

ROWS, VIEWS, MOST_COLUMNS = 8, 4, 16
_TILE_IN, _GAP, _DPI = 0.9, 0.06, 110
_INK = "#757b84"  # readable on white and on black
_WORD = 22  # maximum characters of a class name or an id in a row label


@dataclass(frozen=True)
class Column:
    """One view of every sample, as one stage trains on it."""

    stage: str
    title: str
    images: np.ndarray
    """(rows, size, size, 3), uint8."""
    notes: tuple[str, ...]
    """Text under each image: the row or the image it is mixed with, or empty."""


def picture(recipe: Recipe, images: DataSplits, preprocess: Preprocess, planned: Sequence[StagePlan], rows: int = ROWS) -> bytes:
    """The preview as a PNG: some training images in the evaluation view and in the first views of each stage.

    The pixels are those of the network's input before normalisation. Fresh views are mixed (mixup, CutMix) with other rows of
    the preview; finite ones with the images that training mixes them with.
    """
    chosen = choose(images.train, rows)
    labels = named(images.train.labels[chosen], images.classes)
    evaluated = _batch(stage_views(recipe, None, images.train, preprocess), [SampleRef(i, 0) for i in chosen])
    all_columns = [Column("val, test", "evaluation view", evaluated, ("",) * len(chosen))]
    most = max(1, min(VIEWS, MOST_COLUMNS // len(planned)))
    for stage in planned:
        all_columns += columns(recipe, images.train, preprocess, stage, chosen, most)
    return _draw(all_columns, [f"{_short(label)}\n{_short(images.train.ids[i])}" for label, i in zip(labels, chosen, strict=True)])


def named(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """(N,) what a person calls each sample: its class, or its set of labels."""
    return [text or "none of them" for text in written(labels, classes)] if labels.ndim == 2 else [classes[k] for k in labels.tolist()]


def choose(split: Split, rows: int) -> list[int]:
    """Positions in the split of at most `rows` samples, spread evenly over the classes (or sets) and over the samples of each."""
    kind_N = np.unique(split.labels, axis=0, return_inverse=True)[1].ravel()
    by_class = [np.flatnonzero(kind_N == k) for k in np.unique(kind_N)]
    classes = np.unique(np.linspace(0, len(by_class) - 1, min(rows, len(by_class))).round().astype(int))
    each = -(-rows // len(classes))
    picked = [np.unique(np.linspace(0, len(by_class[k]) - 1, min(each, len(by_class[k]))).round().astype(int)) for k in classes]
    return [int(by_class[k][i]) for k, places in zip(classes, picked, strict=True) for i in places][:rows]


def columns(recipe: Recipe, split: Split, preprocess: Preprocess, stage: StagePlan, chosen: Sequence[int], most: int) -> list[Column]:
    """The views of one stage, at most `most`. They are drawn from the stage's SampleStream over the chosen samples: one step per epoch."""
    spec = stage.spec
    stream = SampleStream(
        seed=recipe.seed, stage=stage.index, num_samples=len(chosen), batch=len(chosen), views=spec.views, first_epoch=stage.first_epoch,
        mixup=0 if stage.mixes_by_view else spec.mixup, cutmix=0 if stage.mixes_by_view else spec.cutmix, size=preprocess.size,
    )  # fmt: skip
    mixes = stage.images_per_view > 1
    plain = spec.augment == "none" and not spec.erasing
    num = 1 if plain and not mixes else min(most, math.ceil(stage.epoch(stage.num_steps)))
    if not mixes or stage.mixes_by_view:
        num = min(num, spec.views or num)
    views = stage_views(recipe, stage, split, preprocess)
    columns = []
    for epoch in range(num):
        items = sorted(stream.step(epoch), key=lambda item: item.position)
        title = "evaluation view" if items[0].view == 0 or plain else f"view {items[0].view}"
        placed = [_placed(item, chosen) for item in items]
        if views.mixing is not None:
            placed = views.mixing.mixed(placed)
        notes = tuple(_mixture(item, split, chosen) if mixes else "" for item in placed)
        columns.append(Column(spec.name, title, _batch(views, placed), notes))
    return columns


def _placed(item: SampleRef, chosen: Sequence[int]) -> SampleRef:
    """Replace positions among the chosen samples by positions in the split."""
    return item._replace(position=chosen[item.position], partner=chosen[item.partner] if item.partner >= 0 else -1)


def _mixture(item: SampleRef, split: Split, chosen: Sequence[int]) -> str:
    other = f"row {chosen.index(item.partner) + 1}" if item.partner in chosen else _short(split.ids[item.partner], 14)
    return f"{100 * (1 - item.lam):.0f} % of {other}"


def _batch(views: Views, items: Sequence[SampleRef]) -> np.ndarray:
    """Images (B, size, size, 3), uint8. Mixed by the code that training uses."""
    x_BCHW = apply_mixup(views.batch(items))["image"]
    if x_BCHW.is_floating_point():
        x_BCHW = (255 * x_BCHW).round().byte()
    return x_BCHW.permute(0, 2, 3, 1).numpy()


def _draw(shown: Sequence[Column], labels: Sequence[str]) -> bytes:
    """The columns as a PNG. The unit of all coordinates is the side of one image."""
    noted = 0.24 if any(any(c.notes) for c in shown) else _GAP
    step_x, step_y, left, top = 1 + _GAP, 1 + noted, 1.9, 0.62
    lefts = _lefts(shown, left, step_x)
    width, height = lefts[-1] + 1.06, top + len(labels) * step_y
    # Without a ground: a page shows it on its own paper, light or dark.
    figure = Figure(figsize=(width * _TILE_IN, height * _TILE_IN), dpi=_DPI, facecolor="none")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    for x, column in zip(lefts, shown, strict=True):
        for row, (pixels, note) in enumerate(zip(column.images, column.notes, strict=True)):
            y = top + row * step_y
            how = "nearest" if len(pixels) <= 96 else "antialiased"
            axes.imshow(pixels, extent=(x, x + 1, y + 1, y), interpolation=how)
            _write(axes, x + 0.5, y + 1.14, note, size=6, ha="center")
        _write(axes, x + 0.5, 0.48, column.title, size=7.5, ha="center")
    for first, last, stage in _groups(lefts, shown):
        axes.plot([first, last + 1], [0.33, 0.33], color=_INK, linewidth=0.8)
        _write(axes, first, 0.18, stage, size=9, weight="bold")
    for row, label in enumerate(labels):
        name, _, sample = label.partition("\n")
        _write(axes, 0.06, top + row * step_y + 0.42, name, size=9, weight="bold")
        _write(axes, 0.06, top + row * step_y + 0.64, sample, size=7)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("auto")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # characters missing from matplotlib's font are drawn as boxes
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _lefts(shown: Sequence[Column], left: float, step: float) -> list[float]:
    """Left edge of each column. There is a gap between stages."""
    lefts = [left]
    for before, column in pairwise(shown):
        lefts.append(lefts[-1] + step + (0.22 if column.stage != before.stage else 0))
    return lefts


def _groups(lefts: Sequence[float], shown: Sequence[Column]) -> list[tuple[float, float, str]]:
    """(left of its first column, left of its last, name) of each stage."""
    groups: dict[str, tuple[float, float]] = {}
    for x, column in zip(lefts, shown, strict=True):
        groups[column.stage] = (groups.get(column.stage, (x, x))[0], x)
    return [(first, last, name) for name, (first, last) in groups.items()]


def _write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Draw text literally: no formulas, control characters escaped."""
    axes.text(x, y, escape.line(text), va="center", parse_math=False, color=_INK, **style)


def _short(text: str, most: int = _WORD) -> str:
    text = escape.line(text)
    return text if len(text) <= most else "…" + text[1 - most :]
