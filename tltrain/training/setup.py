"""Set-up of a run: opens images and networks, chooses caches and devices, and checks everything before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from tltrain.cache import cost_model
from tltrain.cache.measure import Machine
from tltrain.cache.planner import Choices, finds_place_matters
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.paths import cache_root
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits, Split, class_counts, open_images
from tltrain.data.loader import eval_loader
from tltrain.data.mixing import stage_views
from tltrain.data.sampler import Shard, num_micro
from tltrain.data.sources.folder import check_apart
from tltrain.data.unlabelled.pictures import beside
from tltrain.data.views import BaseImages, Views
from tltrain.data.workers import default_workers
from tltrain.distributed.runtime import Runtime
from tltrain.distributed.signals import StopSignal
from tltrain.distributed.strategies import check
from tltrain.distributed.together import once_per_machine
from tltrain.distributed.watchdog import Watch
from tltrain.evaluation import kept_data
from tltrain.evaluation.kept_data import Decision
from tltrain.models import weights
from tltrain.models.factory import Loaded
from tltrain.models.family import WeightsSource
from tltrain.planning.ahead import look_ahead
from tltrain.planning.view_device import ViewDevice
from tltrain.runs import run_dir
from tltrain.runs.checkpoint import Saver, State
from tltrain.runs.early_end import recorded
from tltrain.runs.metrics_log import MetricsLog
from tltrain.runs.trackers import Trackers, chosen
from tltrain.training import optim
from tltrain.training.experiment import Experiment, as_begun, asks_teacher, began_with, check_objective, check_pixels, inputs, open_weights
from tltrain.training.loop import OnStep, ignore_step

T = TypeVar("T")
TAKEN_OVER = "a newer start"
MOST_WITHOUT_TOP5 = 10
"""Classes up to which the terminal shows no top-5: of few classes it is always nearly right."""
DEVICE_BATCH = 128  # images one device holds, unless --max-device-batch says otherwise


@dataclass
class Run:
    """The state that all stages of a run share."""

    path: Path
    experiment: Experiment
    start: RunFlags
    runtime: Runtime
    console: Console
    choices: Choices
    device_batch: int
    chunk: int | None
    """Images in one forward pass of a frozen network, reduced after an out-of-memory error. None: the default."""
    generation: int
    watch: Watch
    saver: Saver | None
    metrics_log: MetricsLog | None = None
    """The log of rows on disk. Open on rank 0 only, from the start of training on."""
    trackers: Trackers = field(default_factory=lambda: Trackers({}, print))
    """Empty on ranks other than 0."""
    bases: dict[str, BaseImages] = field(default_factory=dict)
    """Caches of base images, by split."""
    strong_views: ViewDevice = field(default_factory=ViewDevice)
    """Whether strong views are made by the data workers or on the device."""
    timed: str = ""
    """Lines of the plan: whether --compile pays, and how long the run will take."""
    on_step: OnStep = ignore_step
    """The hook of the caller of `train`, called after each step."""
    stop: StopSignal = field(default_factory=StopSignal)

    @property
    def recipe(self) -> Recipe:
        return self.experiment.recipe

    @property
    def images(self) -> DataSplits:
        return self.experiment.images

    @property
    def student(self) -> Loaded:
        return self.experiment.student

    @property
    def teacher(self) -> Loaded | None:
        return self.experiment.teacher

    @property
    def plan(self) -> Sequence[StagePlan]:
        return self.experiment.plan

    def save(self, state: State) -> None:
        """Pass a checkpoint to the background writer of rank 0."""
        if self.saver is not None:
            self.saver.submit(state)

    def save_failed(self) -> bool:
        """Whether the background writer has failed. False on ranks other than 0."""
        return self.saver is not None and self.saver.failed()

    def log(self, row: dict[str, Any]) -> None:
        if self.metrics_log is not None:
            self.metrics_log.log(row)
        self.trackers.log(row)

    def seal(self) -> None:
        """Save the checksums of the files in the run folder. Called once, after the last write."""
        if self.runtime.is_main and not self.watch.taken_over:
            run_dir.seal(self.path)

    def close_log(self) -> None:
        """Flush the rows to disk and close the trackers. Raises UserError as MetricsLog.close does."""
        try:
            if self.metrics_log is not None:
                self.metrics_log.close()
        finally:
            self.trackers.close()

    def views(self, split: Split, stage: StagePlan | None = None) -> Views:
        """The views that a stage trains on. None: the evaluation view alone."""
        bases, on_device = self.bases.get(split.name), self.strong_views.on_device
        return stage_views(self.recipe, stage, split, self.student.preprocess, bases, on_device)

    def eval_batches(self, split: Split) -> Any:
        return eval_loader(self.views(split), self.shard, self.device_batch, self.recipe.data.eval_limit, self.workers, pin=self.pins)

    @property
    def shard(self) -> Shard:
        """The part of each global batch that this process takes."""
        world = self.runtime.world
        return Shard(self.runtime.rank, world, num_micro(self.recipe.batch, world, self.device_batch))

    @property
    def pins(self) -> bool:
        return self.runtime.device.type == "cuda"

    @property
    def workers(self) -> int:
        return num_workers(self.images, self.start, self.runtime.local_world)


def num_workers(images: DataSplits, start: RunFlags, local_world: int) -> int:
    """Number of data workers of each process. 0 for images that are in memory already."""
    if start.workers is not None:
        return start.workers
    return 0 if images.in_memory else default_workers(local_world)


def open_run(path: Path, recipe: Recipe, start: RunFlags, runtime: Runtime, console: Console, stop: StopSignal) -> Run:
    """Open a run and check everything that can be checked before the first step. Raises UserError."""
    check_apart(recipe.data.source, path)
    sources: dict[str, WeightsSource] = {}
    asks = _shared(runtime, lambda: asks_teacher(path, recipe, console.say))
    with console.doing(f"reading the images of {recipe.data.source}, and the weights"):
        images, kept_images = _open_images(path, recipe, start, runtime, stop, sources, asks)
    for note in (*images.notes, *_shared(runtime, lambda: kept_data.seen_in_training(images, recipe.data, inputs(recipe)))):
        console.say(f"data    {note}", style="yellow")
    with console.doing("building the networks"):
        experiment = as_begun(Experiment.open(recipe, images, sources, asks), path)
    student, teacher, planned = experiment.student, experiment.teacher, experiment.plan
    if start.recompute and student.chain.runs_whole:
        raise UserError(f"--recompute works block by block, and {cost_model.uncut(student.chain)}; drop it")
    kept_flags = run_dir.kept(path)
    _shared(runtime, lambda: check_pixels(path, recipe, kept_flags.get("pixels", {})))
    if start.max_device_batch == kept_flags.get("too_large"):  # same flag as the start that ran out of memory: use the size that fits
        start = replace(start, max_device_batch=None)
    start = replace(start, compile=start.compile or kept_flags.get("compile", False))
    check(runtime, optim.trains_norm_stats(student.chain, planned), start.compile)
    device_batch = start.max_device_batch or kept_flags.get("max_device_batch") or DEVICE_BATCH
    check_objective(recipe, images, _check_batch(experiment, runtime.world, device_batch))
    workers = num_workers(images, start, runtime.local_world)
    machine = Machine(runtime.device, runtime.precision, runtime.accelerator.autocast, workers, runtime.local_world)
    for loaded in (student, teacher):
        if loaded is not None and (loaded is teacher or any(stage.first_trainable_block > 0 for stage in planned)):
            find = partial(finds_place_matters, loaded, machine.device, machine.autocast)
            loaded.chain.place_matters = _shared(runtime, find)
    with console.doing("timing this machine, to plan what is stored"):
        ahead = _shared(runtime, lambda: look_ahead(recipe, start, images, student, teacher, planned, machine, runtime.world))
    console.expect(ahead.later, hide_top5=len(images.classes) <= MOST_WITHOUT_TOP5)
    _shared(runtime, lambda: len(chosen(start)))
    generation = _claim(path, recipe, start, runtime)
    reduced = {name: kept_flags[name] for name in ("too_large", "chunk") if name in kept_flags}
    kept_flags = {"max_device_batch": device_batch, "compile": start.compile} | began_with(planned) | reduced
    with recorded(path, generation, runtime.rank):
        _shared(runtime, lambda: kept_data.write(path, kept_images, images), path)
        _shared(runtime, lambda: _write_environment(path, runtime, images, kept_flags), path)
        watch, saver = _watched(path, start, runtime, console, stop, generation)
    opened = path, experiment, start, runtime, console, ahead.choices, device_batch, kept_flags.get("chunk"), generation, watch, saver
    return Run(*opened, strong_views=ahead.views, timed=ahead.lines)


def _watched(
    path: Path, start: RunFlags, runtime: Runtime, console: Console, stop: StopSignal, generation: int
) -> tuple[Watch, Saver | None]:
    """The watchdog of a start, and on rank 0 its writer of checkpoints."""

    def superseded(newer: int) -> None:
        why = f"generation {newer} has taken {path} over from this one ({generation})" if newer else f"{path} was renamed or deleted"
        console.say(f"{why}: this start stops without writing", style="bold red")
        stop.signal = TAKEN_OVER

    def failed(details: dict[str, Any]) -> None:
        run_dir.write_failure(path, generation, details)

    limit_s = 60 * start.timeout_minutes
    watch = Watch(path, generation, runtime.rank, runtime.world, limit_s, superseded, failed, stop.break_off)
    saver = Saver(run_dir.checkpoints(path), generation, start.keep, watch.may_write, limit_s, watch.alive) if runtime.is_main else None
    return watch, saver


def _open_images(
    path: Path, recipe: Recipe, start: RunFlags, runtime: Runtime, stop: StopSignal, sources: dict[str, WeightsSource], asks: bool
) -> tuple[DataSplits, Decision]:
    """Open the images in the splits of the first start of the run. Raises UserError if they have changed or differ between ranks.

    sources: gets the weights whose fingerprints were taken, by the names of `inputs`, so that they are not read again. On rank 0 only.
    asks: whether a stage that is still to come asks the teacher. One that is not asked is left out.
    """
    opened = partial(open_images, recipe.data)
    drawn = once_per_machine(runtime, stop, cache_root, lambda: beside(opened(), recipe), lambda images: not images.in_memory)

    def decide() -> Decision:
        sources.update(open_weights(recipe, asks))
        hashes = {name: weights.fingerprint(source) for name, source in sources.items()}
        known = {name: digest for name, digest in hashes.items() if digest is not None}
        return kept_data.decide(path, drawn, known, start.accept_data_change)

    decision = _shared(runtime, decide)
    others = runtime.gather(torch.tensor([not decision.is_of(drawn)], device=runtime.device)).flatten().tolist()
    if any(others):
        ranks = ", ".join(str(rank) for rank, other in enumerate(others) if other)
        raise UserError(f"rank {ranks} finds other images in {recipe.data.source} than rank 0; give every machine the same files")
    return decision.apply(drawn, recipe.data.source), decision


def _check_batch(experiment: Experiment, world: int, device_batch: int) -> int:
    """Images of a micro-batch of all processes. Raises UserError for a batch that they cannot share, and one too small for BatchNorm."""
    batch, student = experiment.recipe.batch, experiment.student
    if batch < world:
        raise UserError(f"batch is {batch}, fewer than the {world} processes; raise batch, or start fewer processes")
    together = batch // num_micro(batch, world, device_batch)  # of all processes: they share their statistics
    optim.check_norm_stats(student.chain, experiment.plan, student.preprocess.size, together)
    return together


def _write_environment(path: Path, runtime: Runtime, images: DataSplits, kept_flags: dict[str, Any]) -> None:
    strategy = str(runtime.accelerator.distributed_type.value)
    accelerate = {"processes": runtime.world, "precision": runtime.precision, "distributed": strategy}
    device = torch.cuda.get_device_name() if runtime.device.type == "cuda" else str(runtime.device)
    splits = [s for s in (images.train, images.val, images.test) if s is not None]
    sizes = {s.name: len(s) for s in splits} | ({} if images.unlabelled is None else {"unlabelled": len(images.unlabelled.split)})
    by_class = {s.name: class_counts(s.labels, len(images.classes)).tolist() for s in splits}
    data = {"fingerprint": images.fingerprint, "classes": len(images.classes), **sizes, "names": images.classes, "by_class": by_class}
    run_dir.write_environment(path, accelerate, device, kept_flags, data)


def _claim(path: Path, recipe: Recipe, start: RunFlags, runtime: Runtime) -> int:
    """Claim the next generation for this start. Returns the same number on all ranks."""

    def claim() -> int:
        run_dir.check_owner(path, start.take_over, start.stale_seconds)
        run_dir.create(path, recipe)
        return run_dir.claim(path)

    return _shared(runtime, claim, path)


def _shared(runtime: Runtime, work: Callable[[], T], path: Path | None = None) -> T:
    """Run `work` on rank 0 and share its result. Its UserError is raised on all ranks. path: the folder that `work` writes to."""
    result: T | UserError | None = None
    if runtime.is_main:
        try:
            result = work()
        except UserError as error:
            result = error
        except OSError as error:
            if path is None:
                raise
            result = UserError(f"the run folder {path} cannot be written: {error}; choose another with --folder")
    result = runtime.share(result)
    if isinstance(result, UserError):
        raise result
    return cast(T, result)
