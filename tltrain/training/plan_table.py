"""Renders the plan of a run as a table of blocks by stages, followed by lines about data, batch and caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from tltrain.core.output import escape, wrapping
from tltrain.core.output.console import Terminal, size
from tltrain.core.recipe import DISTILL_LOSS, LOSS, Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits, Split
from tltrain.data.dataset import groups_in
from tltrain.data.sources.names import count_classes
from tltrain.models.chain import Chain
from tltrain.models.factory import Loaded
from tltrain.planning.view_device import ViewDevice
from tltrain.runs.report.formatting import plural
from tltrain.training import optim
from tltrain.training.losses.objective import find_distill_loss
from tltrain.training.weights import solved, trained


def render(
    recipe: Recipe, chain: Chain, plan: Sequence[StagePlan], world: int, num_micro: int, data: str, stored: Sequence[str],
    num_classes: int | None = None,
) -> Group:  # fmt: skip
    """The table that `tltrain plan` prints and plan.txt keeps.

    data: lines about the images. stored: one line for each possible cache, with the decision whether to use it. num_classes: None where
    the recipe has no `distill.top_k`.
    """
    title = _Lines(escape.line(f"{recipe.name}: {recipe.purpose}" if recipe.purpose else recipe.name))
    solved_lines = [f"solved  {solved.plan_line(chain, stage)}" for stage in plan if stage.spec.solve]
    batch_lines = _batch_lines(recipe, chain, plan, world, num_micro, num_classes)
    lines = [data, *batch_lines, *solved_lines, *(f"cache   {line}" for line in stored)]
    return Group(title, _Stages(chain, plan), Text(), _Lines("\n".join(lines)))


@dataclass(frozen=True)
class _Lines:
    """Lines that may begin with a word of at most seven letters: on a terminal, what does not fit goes on behind it."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = wrapping.width_of(console.file)
        for line in (self.text if width is None else wrapping.fitted(self.text, width)).splitlines():
            yield Text(line, no_wrap=True, overflow="ignore")


@dataclass(frozen=True)
class _Stages:
    """Blocks by stages: one table, or several below each other where a terminal is too narrow for all stages."""

    chain: Chain
    plan: Sequence[StagePlan]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        at_once = len(self.plan)
        while (
            at_once > 1
            and console.measure(_table(self.chain, self.plan[:at_once]), options=options.update(width=10_000)).maximum > options.max_width
        ):
            at_once -= 1
        for first in range(0, len(self.plan), at_once):
            if first:
                yield Text()
            yield _table(self.chain, self.plan[first : first + at_once])


def _table(chain: Chain, plan: Sequence[StagePlan]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("block")
    table.add_column("parameters", justify="right")
    for stage in plan:
        table.add_column(f"{stage.index} {stage.spec.name}", justify="right")
    for i, block in enumerate(chain.blocks):
        count = sum(p.numel() for _, p in chain.parameters_of(i))
        table.add_row(Text(block.name), f"{count:,}", *(_lr(stage, i) for stage in plan))
    table.add_section()
    total = sum(p.numel() for p in chain.parameters())
    table.add_row("trains", f"{total:,}", *(f"{optim.trainable(chain, s):,}" for s in plan), style="bold")
    if any(s.spec.trains != "all" for s in plan):
        table.add_row("of blocks", "", *(trained.describe(chain, s) for s in plan))
    if any(s.spec.ema is not None or s.spec.carry in ("ema", "blend") for s in plan):
        table.add_row("hands on", "", *(_carried(s) for s in plan))
    table.add_row("epochs", "", *(f"{s.epoch(s.num_steps):.4g}" for s in plan))
    table.add_row("steps", "", *(f"{s.num_steps:,}" if not s.spec.solve else "solved" for s in plan))
    table.add_row("optimizer", "", *(_optimizer(chain, s) for s in plan))
    if any(s.spec.loss != LOSS for s in plan):  # of several labels it is binary, as the line on the data says
        table.add_row("loss", "", *(s.spec.loss for s in plan))
    table.add_row("schedule", "", *(_schedule(s) for s in plan))
    table.add_row("views", "", *(_views(s) for s in plan))
    return table


def text(renderable: Group) -> str:
    """The table as plain text, for plan.txt."""
    console = Terminal(file=StringIO(), width=40 + 24 * 8, color_system=None)
    console.print(renderable, crop=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"  # type: ignore[attr-defined]


def _lr(stage: StagePlan, block: int) -> str:
    scale = stage.scales[block]
    if not scale:
        return "frozen"
    return "solved" if stage.spec.solve else f"{stage.lr * scale:.3g}"


def _optimizer(chain: Chain, stage: StagePlan) -> str:
    """The optimizer and the size of its state, or what works out the head in its place."""
    if stage.spec.solve:
        return stage.spec.solve.replace("_", " ")
    return f"{stage.spec.optimizer}, {size(optim.state_bytes(chain, stage))}"


def _carried(stage: StagePlan) -> str:
    return stage.spec.carry + (f", ema {stage.spec.ema:g}" if stage.spec.ema is not None else "")


def _schedule(stage: StagePlan) -> str:
    if stage.spec.solve:
        return ""
    warmup = f"{stage.spec.warmup:.0%} warm-up, " if stage.spec.warmup else ""
    return warmup + stage.spec.schedule


def _views(stage: StagePlan) -> str:
    count = "fresh" if stage.spec.views is None else str(stage.spec.views)
    erased = f", {stage.spec.erasing:.0%} erased" if stage.spec.erasing else ""
    return f"{count}, {stage.spec.augment}{erased}{', mixed' * (stage.images_per_view > 1)}"


def taught_by(recipe: Recipe) -> str:
    """Who teaches, such as `two teachers: runs/a and runs/b (mean of their answers)`. One: `one teacher: ...`."""
    teachers = () if recipe.distill is None else recipe.distill.teachers
    *most, last = [escape.line(spec.weights or f"{spec.name} with random weights") for spec in teachers]
    num = {1: "one teacher", 2: "two teachers", 3: "three teachers"}.get(len(teachers), f"{len(teachers)} teachers")
    return f"{num}: {', '.join(most)}{' and ' if most else ''}{last}" + (" (the mean of their answers)" if most else "")


def _batch_lines(recipe: Recipe, chain: Chain, plan: Sequence[StagePlan], world: int, num_micro: int, num_classes: int | None) -> list[str]:
    largest = math.ceil(math.ceil(recipe.batch / world) / num_micro)
    exact = recipe.batch == world * num_micro * largest
    processes = f"{world} process{'es' if world > 1 else ''}"
    micro = f"{num_micro} micro-batch{'es' if num_micro > 1 else ''}"
    lines = [f"batch   {recipe.batch} = {processes} x {micro} x {'' if exact else 'at most '}{largest} images"]
    if optim.trains_norm_stats(chain, plan):
        shared = f"{largest} images share a forward pass"
        lines.append(f"note    norm_stats: train: {shared}, so the result depends on processes and micro-batches")
    moving = [s.spec for s in plan if optim.trains_norm_stats(chain, [s])]
    if any(spec.ema is not None for spec in moving):
        lines.append("note    ema averages BatchNorm's running statistics too")
    if any(spec.carry == "blend" for spec in moving):
        lines.append("note    carry: blend interpolates BatchNorm's running means and standard deviations: exact at the ends alone")
    if chain.place_matters:
        lines.append("note    an image's features depend on its place in a batch here, so what is frozen runs image by image")
    if own := optim.own_dropout(chain, plan):
        named = f"the network's own dropout ({own[0]}{f' and {len(own) - 1} more' * (len(own) > 1)})"
        lines.append(f"note    {named} is drawn per process and micro-batch, so the result depends on their number")
    lines += _mixing_lines(plan)
    if recipe.backbone.dropout:
        lines.append("note    dropout is drawn per process and micro-batch, so the result depends on their number")
    if recipe.matches_features:
        lines.append(_pretraining_line(recipe, plan[0]))
    elif (distill := recipe.distill) is not None:
        term = "KL" if distill.loss == DISTILL_LOSS else distill.loss
        rest = "cross entropy" if all(s.spec.loss == LOSS for s in plan) else "each stage's loss"
        if distill.top_k is not None and (num_classes is None or distill.top_k < num_classes):
            term += f" over the teacher's {distill.top_k} likeliest classes and all others as one,"
        lines.append(f"distil  {distill.weight:g} x {term} at T = {distill.temperature:g}, the rest {rest}")
        lines += [f"teacher {taught_by(recipe)}"] if distill.ensemble else []
        if find_distill_loss(distill.loss).reads == "batch" and num_micro > 1:
            told = f"{distill.loss} compares the images of a micro-batch of all processes, {recipe.batch // num_micro} of {recipe.batch}"
            lines.append(f"note    {told}, so the result depends on the number of micro-batches")
    return lines


def _pretraining_line(recipe: Recipe, stage: StagePlan) -> str:
    """The line about a first stage that learns features. Their number is not known where the teacher is still to be trained."""
    assert recipe.distill is not None
    assert stage.features is not None
    teacher, num, side = recipe.distill.teacher, stage.features.num_out, stage.features.side
    named = escape.line(" ".join(filter(None, (teacher.name, teacher.weights))))
    where = "" if side is None else f" at {side} x {side} places" if side else " at each place of its map"
    whose = f"the {f'{num:,} ' if num else ''}features of {named}{where}"
    how = f"{recipe.distill.loss}, by a linear map in place of the head"
    return f"distil  {stage.spec.name}: {whose} ({how}), without labels and without val; the stages after it learn labels alone"


FEW_MIXED = 8
"""Finite views below which a note says that the mixes of an image are few."""


def _mixing_lines(plan: Sequence[StagePlan]) -> list[str]:
    """Notes on mixed views: their cost, and the older way of mixing in a run that began with it."""
    mixed = [stage for stage in plan if stage.images_per_view > 1]
    if not mixed:
        return []
    names = ", ".join(stage.spec.name for stage in mixed)
    lines = [f"note    a mixed view (stage {names}) is made of two images, which are both decoded and augmented"]
    for stage in (each for each in mixed if not each.mixes_anew):
        if stage.spec.views is not None and stage.spec.views < FEW_MIXED:
            kept = (
                f"keeps the partner and share of each of its {stage.spec.views} mixed views"
                if stage.spec.views > 1
                else ("has one mixed view, whose partner and share it keeps")
            )
            lines.append(
                f"note    in stage {stage.spec.name} each image {kept}, and may never be seen unmixed; more views mix it with more"
            )
    if any(stage.mixes_anew for stage in mixed):
        lines.append("note    this run began with a tltrain that mixes finite views anew in each step, and goes on so")
    return lines


def describe_data(images: DataSplits, student: Loaded, views: ViewDevice) -> str:
    """The lines of the plan about images, classes, weights and where views are made."""
    sizes = ", ".join(_size_of(images, split) for split in (images.train, images.val, images.test) if split is not None)
    view = student.preprocess
    if images.unlabelled is not None:
        sizes += f", {len(images.unlabelled.split):,} unlabelled"
    seen = f"seen at {view.size} px (shorter side {view.resize})"
    strong = f"\nviews   strong ones are made {views.why}" if views.why else ""
    several = ", several an image (binary cross entropy, the mean over classes)" if images.train.labels.ndim == 2 else ""
    classes = f"classes {count_classes(images.classes, images.train.labels)} (training images)"
    return f"data    {sizes} images, {len(images.classes)} classes{several}, {seen}\n{classes}\nweights {student.origin}{strong}"


def describe_device(device: str, precision: str, tf32: bool) -> str:
    """The line of the plan about the GPU. device: its name."""
    rounded = ", products in TF32 (NVIDIA_TF32_OVERRIDE=0 keeps them whole)" if tf32 else ""
    return f"device  {device}, {'fp32' if precision == 'no' else precision}{rounded}"


def _size_of(images: DataSplits, split: Split) -> str:
    """`40 val (5 groups)`: accuracies count images, and how sure they are rests on the groups. Without groups `40 val`."""
    group_N = groups_in(images, split)
    return f"{len(split.labels):,} {split.name}" + (f" ({plural(len(np.unique(group_N)), 'group')})" if group_N is not None else "")
