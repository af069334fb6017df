"""Passes of a finished run over its corrupted images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.output.console import Console, clock, duration
from tltrain.data.corruptions import VERSION, corrupt
from tltrain.data.corruptions.views import CELLS, CLEAN, Cell, CorruptedViews
from tltrain.data.dataset import groups_in
from tltrain.data.loader import eval_batches, item_loader
from tltrain.data.multilabel.label_sets import written
from tltrain.data.sampler import Shard
from tltrain.data.views import Batch
from tltrain.data.workers import default_workers
from tltrain.distributed.out_of_memory import fitting
from tltrain.distributed.runtime import Runtime, torch_settings_kept
from tltrain.evaluation.evaluate import Opened, opened_run
from tltrain.evaluation.evaluator import answers
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.evaluation.robustness import measured as kept
from tltrain.evaluation.robustness.measured import Measured
from tltrain.runs import run_dir

WORTH_WORKERS_S = 20.0
"""Seconds of corrupting images from which data workers are worth their start. They change nothing but the time."""


@dataclass(frozen=True)
class Measurement:
    """The answers, and the views that they were given to, for examples."""

    measured: Measured
    views: CorruptedViews
    is_main: bool


@torch_settings_kept()
def measure(path: Path, source: str | None, which: str, cells: Sequence[Cell], device_batch: int, console: Console) -> Measurement:
    """Make the passes that the run folder does not hold yet, the clean one first. What was asked stands in `tltrain evaluate`.

    Raises UserError as `evaluate` does.
    """
    with console.doing(f"reading the images of {path}"):
        runtime, run = opened_run(path, source, which)
    if not runtime.is_main:
        console = Console(enabled=False)
    for note in run.notes:
        console.say(f"note    {note}", style="yellow")
    passes = _Passes(runtime, run, CorruptedViews(run.split, run.preprocess, run.spec.seed), console)
    measured = passes.begin(_folder(path, source, which), _about(run, path, source, which))
    todo = [cell for cell in cells if cell not in measured.predicted]
    if todo:
        if runtime.is_main:
            measured.write()
        num = len(measured.ids)
        if runtime.world == 1:
            pass_s, fits = fitting(lambda batch: passes.seconds(num, batch), device_batch)
            passes.announce(measured, todo, pass_s)
            fitting(lambda batch: passes.make(measured, todo, batch), fits)
        else:  # one that runs out of memory cannot retry without the others
            passes.announce(measured, todo, passes.seconds(num, device_batch))
            passes.make(measured, todo, device_batch)
    console.busy(None)
    return Measurement(measured, passes.views, runtime.is_main)


def _folder(path: Path, source: str | None, which: str) -> Path:
    """RUN/corruptions for the run's own test images, and a folder beside it for others."""
    if source is None:
        return path / ("corruptions" if which == "test" else f"corruptions-{which}")
    return path / f"corruptions-{which}-{hashlib.blake2b(source.encode(), digest_size=4).hexdigest()}"


def _about(run: Opened, path: Path, source: str | None, which: str) -> dict[str, Any]:
    preprocess = run.preprocess
    return {
        "version": VERSION, "weights": files.sha256(run_dir.finished_weights(path)), "source": source or run.spec.source, "split": which,
        "images": run.images.fingerprint, "seed": run.spec.seed, "limit": run.spec.eval_limit, "size": preprocess.size,
        "resize": preprocess.resize, "interpolation": preprocess.interpolation,
    }  # fmt: skip


@dataclass
class _Passes:
    runtime: Runtime
    run: Opened
    views: CorruptedViews
    console: Console
    workers: int = 0

    def __post_init__(self) -> None:
        self.shard = Shard(self.runtime.rank, self.runtime.world)

    def begin(self, folder: Path, about: dict[str, Any]) -> Measured:
        """What the folder holds, if that is of the same weights and images; else nothing yet. The same on every process."""
        runtime, split = self.runtime, self.run.split
        there, problem = None, ""
        try:
            there = kept.read(folder) if runtime.is_main else None
        except UserError as error:  # raised by all processes, or the others would wait for this one
            problem = str(error)
        if problem := runtime.share(problem):
            raise UserError(problem)
        if there is not None and there.about != about:
            other = sorted(key for key in {*about, *there.about} if about.get(key) != there.about.get(key))
            self.console.say(f"note    {folder} is of other {', '.join(other)}: it is measured anew", style="yellow")
            there = None
        known = runtime.share(None if there is None else there.predicted)
        at = [item.position for part in eval_batches(len(split), Shard(0, 1), 1, self.run.spec.eval_limit) for item in part]
        group_N = groups_in(self.run.images, split)
        group_N = None if group_N is None else group_N[at]
        return Measured(folder, about, tuple(split.ids[i] for i in at), self._named(split.labels[at]), known or {}, group_N)

    def seconds(self, num: int, batch: int) -> float:
        """Of a pass over so many images, by its first batch."""
        self._forward(min(batch, num))  # the first one is slower
        began = clock()
        self._forward(min(batch, num))
        return (clock() - began) / min(batch, num) * num / self.shard.world

    def announce(self, measured: Measured, todo: Sequence[Cell], pass_s: float) -> None:
        """Say what will be done and how long that will take: pass_s seconds a pass, and what one corrupted image of each kind takes."""
        num = len(measured.ids)
        corrupting_s = sum(self._seconds(cell) for cell in todo) * num / self.shard.world
        workers = default_workers(self.runtime.local_world)
        self.workers = workers if corrupting_s > WORTH_WORKERS_S and workers > 1 else 0
        seconds = len(todo) * pass_s + corrupting_s / max(1, self.workers)
        there = len(measured.predicted)
        self.console.say(
            f"robust  {len(todo)} passes over {num:,} images, about {duration(seconds)}"
            + (f"; {there} are kept from before" if there else "")
        )

    def make(self, measured: Measured, todo: Sequence[Cell], batch: int) -> None:
        """Make the passes that are missing, each kept as soon as it is done. Collective."""
        rest, own, runtime = [cell for cell in todo if cell not in measured.predicted], self._batches(batch), self.runtime
        items = [[item._replace(view=CELLS.index(cell)) for item in part] for cell in rest for part in own]
        progress = _Progress(self.console, rest, len(own), clock())
        stream = progress.over(iter(item_loader(self.views, items, self.workers, runtime.device.type == "cuda")))
        for cell in rest:
            said = answers(runtime, self.run.chain, islice(stream, len(own)), self.run.temperature)
            named = replace(said, thresholds=self.run.thresholds).named if isinstance(said, LabelPredictions) else said.predicted
            predicted_N = self._named(named)
            if runtime.is_main:
                measured.add(cell, predicted_N)
            else:
                measured.predicted[cell] = predicted_N

    def _named(self, label: np.ndarray) -> np.ndarray:
        """(N,) classes as they are, and sets of labels (N, K) as text."""
        return label if label.ndim == 1 else np.array(written(label, self.run.classes), dtype=str)

    def _batches(self, batch: int) -> list[list[Any]]:
        return eval_batches(len(self.views), self.shard, batch, self.run.spec.eval_limit)

    def _forward(self, num: int) -> None:
        part = self._batches(num)[0]
        answers(self.runtime, self.run.chain, [self.views.batch(part)])

    def _seconds(self, cell: Cell) -> float:
        """Of corrupting one image."""
        if cell == CLEAN:
            return 0.0
        clean_HWC, began = self.views.view(0, 0).permute(1, 2, 0).numpy(), clock()
        corrupt(clean_HWC, *cell, self.views.seed, "")
        return clock() - began


@dataclass
class _Progress:
    """Says which pass is made, and how long the rest will take."""

    console: Console
    cells: Sequence[Cell]
    num_batches: int
    began: float
    done: int = 0

    def over(self, batches: Iterator[Batch]) -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches:
            cell = self.cells[self.done // self.num_batches]
            what = f"{cell.name.replace('_', ' ')} {cell.severity or ''}".rstrip()
            spent = clock() - self.began
            left = f", {duration(spent / self.done * (len(self.cells) * self.num_batches - self.done))} left" if self.done else ""
            self.console.busy(f"pass {1 + self.done // self.num_batches} of {len(self.cells)}: {what}{left}")
            self.done += 1
            yield batch
