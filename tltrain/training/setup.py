"""What stands before the first step: everything that can be refused is refused here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from tltrain.cache import cost_model
from tltrain.cache.image_cache import ImageCache
from tltrain.cache.measure import Machine
from tltrain.cache.planner import Choices, survey
from tltrain.core import metric, registry, stage_plan
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags, run_path
from tltrain.core.output.console import Console
from tltrain.core.recipe import Augment, Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits, Split, open_images, outline_images
from tltrain.data.loader import eval_loader
from tltrain.data.sampler import num_micro
from tltrain.data.sources.folder import check_apart
from tltrain.data.sources.names import count_classes
from tltrain.data.views import Views
from tltrain.distributed.runtime import Runtime
from tltrain.distributed.signals import StopSignal
from tltrain.distributed.strategies import check
from tltrain.distributed.watchdog import Watch
from tltrain.evaluation import kept_data
from tltrain.evaluation.kept_data import Decision
from tltrain.models import factory, weights
from tltrain.models.factory import Loaded
from tltrain.planning import compiling
from tltrain.planning.view_device import ViewDevice, view_device
from tltrain.runs import run_dir
from tltrain.runs.checkpoint import Saver, State
from tltrain.runs.metrics_log import MetricsLog
from tltrain.runs.trackers import Trackers, chosen
from tltrain.training import optim, plan_table
from tltrain.training.losses import objective

T = TypeVar("T")
TAKEN_OVER = "a newer start"
DEVICE_BATCH = 128  # images one device holds, unless --max-device-batch says otherwise


@dataclass
class Run:
    """What stays the same over the stages of a run."""

    path: Path
    recipe: Recipe
    start: RunFlags
    runtime: Runtime
    console: Console
    images: DataSplits
    student: Loaded
    teacher: Loaded | None
    plan: Sequence[StagePlan]
    choices: Choices
    device_batch: int
    chunk: int | None
    """Images that a frozen network sees at a time, where the usual number did not fit."""
    generation: int
    watch: Watch
    saver: Saver | None
    metrics_log: MetricsLog | None = None
    """The rows on disk; on process 0, from where training begins."""
    trackers: Trackers = field(default_factory=lambda: Trackers({}, print))
    """On the other processes there are none."""
    bases: dict[str, ImageCache] = field(default_factory=dict)
    """Stores of base images, by split."""
    strong_views: ViewDevice = field(default_factory=ViewDevice)
    """Where they are made."""
    compiling: str = ""
    """A line of the plan: whether --compile pays."""

    def save(self, state: State) -> None:
        """Hand a checkpoint to the background writer of process 0."""
        if self.saver is not None:
            self.saver.submit(state)

    def save_failed(self) -> bool:
        return self.saver is not None and self.saver.failed()

    def log(self, row: dict[str, Any]) -> None:
        if self.metrics_log is not None:
            self.metrics_log.log(row)
        self.trackers.log(row)

    def close_log(self) -> None:
        """Force the rows to the disk, and end the trackers. Raises UserError as MetricsLog.close does."""
        try:
            if self.metrics_log is not None:
                self.metrics_log.close()
        finally:
            self.trackers.close()

    def views(self, split: Split, augment: Augment = "none") -> Views:
        data = self.recipe.data
        on_device = self.strong_views.on_device
        return Views(split, self.student.preprocess, augment, data.flip, data.seed, self.bases.get(split.name), on_device)

    def eval_batches(self, split: Split) -> Any:
        runtime = self.runtime
        limit = self.recipe.data.eval_limit
        return eval_loader(self.views(split), runtime.rank, runtime.world, self.device_batch, limit, self.workers, pin=self.pins)

    @property
    def pins(self) -> bool:
        return self.runtime.device.type == "cuda"

    @property
    def workers(self) -> int:
        return num_workers(self.images, self.start, self.runtime.local_world)


def num_workers(images: DataSplits, start: RunFlags, local_world: int) -> int:
    """Data workers of a process: none for images that are in memory already."""
    if start.workers is not None:
        return start.workers
    return 0 if images.in_memory else min(8, max(1, (os.cpu_count() or 1) // local_world))


def open_run(path: Path, recipe: Recipe, start: RunFlags, runtime: Runtime, console: Console, stop: StopSignal) -> Run:
    """Everything that can be refused is refused here, before the first step."""
    check_apart(recipe.data.source, path)
    images, kept_images = _open_images(path, recipe, start, runtime)
    for note in images.notes:
        console.say(f"data    {note}", style="yellow")
    student, teacher = open_nets(recipe, images)
    planned = stage_plan.plan(recipe, student.chain, len(images.train.labels), images.val is not None)
    check_objective(recipe, images)
    if recipe.batch < runtime.world:
        raise UserError(f"batch is {recipe.batch}, fewer than the {runtime.world} processes; raise batch, or start fewer processes")
    if start.recompute and student.chain.runs_whole:
        raise UserError(f"--recompute works block by block, and {cost_model.uncut(student.chain)}; drop it")
    kept = run_dir.kept(path)
    if start.max_device_batch == kept.get("too_large"):  # the same command again: with what has been found to fit
        start = replace(start, max_device_batch=None)
    start = replace(start, compile=start.compile or kept.get("compile", False))
    check(runtime, optim.trains_norm_stats(student.chain, planned), start.compile)
    machine = Machine(
        runtime.device,
        runtime.precision,
        runtime.accelerator.autocast,
        num_workers(images, start, runtime.local_world),
        runtime.local_world,
    )
    choices = _shared(runtime, lambda: survey(recipe, start, images, student, teacher, planned, machine))
    views = _shared(runtime, lambda: view_device(recipe, start, images.train, student, planned, machine, choices))
    pays = _shared(runtime, lambda: compiling.note(start, student, planned, machine, runtime.world))
    _shared(runtime, lambda: len(chosen(start)))
    device_batch = start.max_device_batch or kept.get("max_device_batch") or DEVICE_BATCH
    generation = _claim(path, recipe, start, runtime)
    found = {name: kept[name] for name in ("too_large", "chunk") if name in kept}
    kept = {"max_device_batch": device_batch, "compile": start.compile} | found
    _shared(runtime, lambda: kept_data.write(path, kept_images, images), path)
    _shared(runtime, lambda: _write_environment(path, runtime, images, kept), path)

    def superseded(newer: int) -> None:
        console.say(f"generation {newer} has taken {path} over from this one ({generation}), which stops without writing", style="bold red")
        stop.signal = TAKEN_OVER

    def failed(details: dict[str, Any]) -> None:
        run_dir.write_failure(path, generation, details)

    watch = Watch(path, generation, runtime.rank, runtime.world, 60 * start.timeout_minutes, superseded, failed)
    saver = Saver(run_dir.checkpoints(path), generation, start.keep, lambda: not watch.taken_over) if runtime.is_main else None
    sizes = device_batch, kept.get("chunk")
    opened = path, recipe, start, runtime, console, images, student, teacher, planned, choices, *sizes, generation, watch, saver
    return Run(*opened, strong_views=views, compiling=pays)


def _open_images(path: Path, recipe: Recipe, start: RunFlags, runtime: Runtime) -> tuple[DataSplits, Decision]:
    """The images, in the splits that an earlier start of the run gave them. Raises UserError where they are others than then."""
    drawn = open_images(recipe.data)

    def decide() -> Decision:
        specs = {"weights": recipe.backbone, "teacher": recipe.distill.teacher if recipe.distill else None}
        hashes = {name: weights.fingerprint(spec) for name, spec in specs.items() if spec is not None}
        inputs = {name: digest for name, digest in hashes.items() if digest is not None}
        return kept_data.decide(path, drawn, inputs, start.accept_data_change)

    decision = _shared(runtime, decide)
    others = runtime.gather(torch.tensor([drawn.fingerprint != decision.fingerprint], device=runtime.device)).flatten().tolist()
    if any(others):
        ranks = ", ".join(str(rank) for rank, other in enumerate(others) if other)
        raise UserError(f"rank {ranks} finds other images in {recipe.data.source} than rank 0; give every machine the same files")
    return decision.apply(drawn), decision


def check_objective(recipe: Recipe, images: DataSplits) -> None:
    """Raise UserError where a loss or a metric cannot be had, a loss is none, or `select` says nothing of these classes."""
    num_classes = len(images.classes)
    if recipe.select == "top5" and num_classes <= 5:
        raise UserError(f"select is top5, and there are only {num_classes} classes, so that it is always right; choose top1")
    for name in registry.names("metrics"):
        metric.metric(name)
    for name in dict.fromkeys(stage.loss for stage in recipe.stages):
        objective.label_loss(name, num_classes)
    if recipe.distill is not None:
        objective.distill_loss(recipe.distill.loss, num_classes)


def _write_environment(path: Path, runtime: Runtime, images: DataSplits, kept: dict[str, Any]) -> None:
    strategy = str(runtime.accelerator.distributed_type.value)
    accelerate = {"processes": runtime.world, "precision": runtime.precision, "distributed": strategy}
    device = torch.cuda.get_device_name() if runtime.device.type == "cuda" else str(runtime.device)
    sizes = {s.name: len(s) for s in (images.train, images.val, images.test) if s is not None}
    data = {"fingerprint": images.fingerprint, "classes": len(images.classes), **sizes}
    run_dir.write_environment(path, accelerate, device, kept, data)


def _claim(path: Path, recipe: Recipe, start: RunFlags, runtime: Runtime) -> int:
    """This start's generation, known to all processes."""

    def claim() -> int:
        run_dir.check_owner(path, start.take_over, start.stale_seconds)
        run_dir.create(path, recipe)
        return run_dir.claim(path)

    return _shared(runtime, claim, path)


def _shared(runtime: Runtime, work: Callable[[], T], path: Path | None = None) -> T:
    """What process 0 finds out, known to all processes. What it refuses, all refuse. path: of the folder that `work` writes to."""
    found: T | UserError | None = None
    if runtime.is_main:
        try:
            found = work()
        except UserError as error:
            found = error
        except OSError as error:
            if path is None:
                raise
            found = UserError(f"the run folder {path} cannot be written: {error}; choose another with --folder")
    found = runtime.share(found)
    if isinstance(found, UserError):
        raise found
    return cast(T, found)


def open_nets(recipe: Recipe, images: DataSplits) -> tuple[Loaded, Loaded | None]:
    """The student with a new head for these classes, and the frozen teacher. Raises UserError."""
    data = recipe.data
    student = factory.load(recipe.backbone, classes=images.classes, size=data.size, resize=data.resize, head="new", seed=recipe.seed)
    if recipe.distill is None:
        return student, None
    view = student.preprocess
    spec = recipe.distill.teacher
    teacher = factory.load(spec, classes=images.classes, size=view.size, resize=view.resize, head="keep", seed=recipe.seed)
    teacher.chain.freeze(len(teacher.chain.blocks), norm_stats=False).eval()
    return student, teacher


def describe_data(images: DataSplits, student: Loaded, views: ViewDevice) -> str:
    sizes = ", ".join(f"{len(s.labels):,} {s.name}" for s in (images.train, images.val, images.test) if s is not None)
    view = student.preprocess
    seen = f"seen at {view.size} px (shorter side {view.resize})"
    made = f"\nviews   strong ones are made {views.why}" if views.why else ""
    classes = f"classes {count_classes(images.classes, images.train.labels)} (training images)"
    return f"data    {sizes} images, {len(images.classes)} classes, {seen}\n{classes}\nweights {student.origin}{made}"


def describe_device(device: str, precision: str, tf32: bool) -> str:
    """The start line of a GPU. device: its name."""
    rounded = ", products in TF32 (NVIDIA_TF32_OVERRIDE=0 keeps them whole)" if tf32 else ""
    return f"device  {device}, {'fp32' if precision == 'no' else precision}{rounded}"


def show_plan(recipe: Recipe, start: RunFlags, console: Console) -> None:
    """`tltrain plan`: the table, without reading weights and without training."""
    check_apart(recipe.data.source, run_path(recipe, start))
    images = outline_images(recipe.data)
    for note in images.notes:
        console.say(f"data    {note}", style="yellow")
    loaded = factory.skeleton(recipe.backbone, len(images.classes), recipe.data.size, recipe.data.resize)
    planned = stage_plan.plan(recipe, loaded.chain, len(images.train.labels), images.val is not None)
    check_objective(recipe, images)
    micro = num_micro(recipe.batch, 1, start.max_device_batch or DEVICE_BATCH)
    teacher, view = None, loaded.preprocess
    if recipe.distill is not None:
        try:
            teacher = factory.skeleton(recipe.distill.teacher, len(images.classes), view.size, view.resize)
        except UserError as error:  # often it is still to be trained
            console.say(f"teacher planned without it: {error}", style="yellow")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine(device, "no", contextlib.nullcontext, num_workers(images, start, 1), 1)
    choices = survey(recipe, start, images, loaded, teacher, planned, machine)
    views = view_device(recipe, start, images.train, loaded, planned, machine, choices)
    about = "\n".join(filter(None, (describe_data(images, loaded, views), compiling.note(start, loaded, planned, machine))))
    console.show(plan_table.render(recipe, loaded.chain, planned, 1, micro, about, choices.lines()))
