"""One stage of a run: builds network, optimizer and data from plain weights, trains, and returns plain weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tltrain.cache.cost_model import why_not_cacheable
from tltrain.cache.frozen import FEATURES, TEACHER, FrozenModel, InputAdapter, without_suffix
from tltrain.cache.planner import prefix_of, teacher_of
from tltrain.core.output.console import clock
from tltrain.core.stage_plan import StagePlan
from tltrain.data import class_weights, label_weights
from tltrain.data.dataset import sampling_weights
from tltrain.data.loader import eval_positions, train_loader, train_positions
from tltrain.data.sampler import SampleStream
from tltrain.data.views import Batch
from tltrain.distributed.out_of_memory import is_out_of_memory
from tltrain.distributed.signals import StopSignal
from tltrain.distributed.strategies import Strategy, is_sharded, spread
from tltrain.distributed.sync_batchnorm import share_statistics
from tltrain.models.chain import Chain, is_batch_norm, on_device
from tltrain.models.metadata import read_state, write_weights
from tltrain.runs import manifest, run_dir
from tltrain.runs.checkpoint import State
from tltrain.training import loop, optim
from tltrain.training.loop import SolveHead, StageContext, StageResult
from tltrain.training.losses import objective
from tltrain.training.losses.objective import Distillation, Objective
from tltrain.training.losses.over_batch import Together
from tltrain.training.matching import linear_map
from tltrain.training.matching.features import Matching, feature_loss
from tltrain.training.setup import Run
from tltrain.training.stage_cache import Attached, StageStores, open_stores
from tltrain.training.weights import lora, solved, trained
from tltrain.training.weights.blend import blend
from tltrain.training.weights.ema import Ema


def run_stage(run: Run, stage: StagePlan, state: State, teacher: Chain | None, stop: StopSignal) -> tuple[StageResult, dict[str, Tensor]]:
    """Build a stage from plain weights, train it from `state` on, and free its memory.

    Returns its result, and the plain weights it ends with: its last ones, their average, or a blend. Those are complete on process 0.
    """
    began, progress = clock(), state.progress

    def should_stop(where: str) -> bool:
        run.watch.at(stage.spec.name, progress.step, f"fill {where}")
        return stop.signal is not None

    run.watch.at(stage.spec.name, progress.step, "build")
    assert teacher is not None or run.recipe.distill is None or not stage.taught, "the checkpoint behind this stage is gone since the start"
    chain = _chain(run, stage, state.weights)
    if teacher is not None and not stage.taught:
        on_device(teacher, torch.device("cpu"))  # of the first stage alone: its memory is the student's now
    frozen = _frozen(run, stage, chain, teacher if stage.taught else None)
    stores = open_stores(run, stage, frozen.prefix, frozen.teacher if frozen.finite else None, should_stop)
    with contextlib.closing(stores):
        run.watch.at(stage.spec.name, progress.step, "build")
        strategy = _spread(run, stage, chain, state)
        ctx = _context(run, stage, state, strategy, frozen, stores, stop)
        del frozen  # frees the prefix if its features are cached
        if stores.train is not None and (stores.val is not None or run.images.val is None):
            strategy.forget(stage.first_trainable_block)
        with _freed_if_out_of_memory(run, strategy):
            fit = loop.fit(ctx, replace(progress, seconds=progress.seconds + clock() - began), state.best)
            run.watch.at(stage.spec.name, fit.progress.step, "hand on")
            if stage.spec.carry == "blend" and fit.reason in loop.ENDED:
                fit, last = _blended(run, ctx, fit)
            else:
                last = linear_map.plain(loop.carried_weights(ctx), run.student.chain.net.state_dict())
        del chain, ctx  # free the device memory before the next stage is built
        strategy.close()
        return fit, last


@contextlib.contextmanager
def _freed_if_out_of_memory(run: Run, strategy: Strategy) -> Iterator[None]:
    """Free a stage that ran out of memory, so that this process can start it again.

    Several ranks do not free it: that may take a collective, which a failed rank does not enter.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) and run.runtime.world == 1:
            strategy.close()
        raise


def _chain(run: Run, stage: StagePlan, weights: dict[str, Tensor]) -> Chain:
    """A new chain with these weights, frozen as the stage requires, in train mode on the device.

    weights: plain at the start of a stage; of a checkpoint within one, with low-rank updates and a linear map where it has them.
    """
    runtime = run.runtime
    chain = copy.deepcopy(run.student.chain)
    chain.net.load_state_dict(linear_map.plain(lora.plain(weights), chain.net.state_dict()))
    trained.freeze(on_device(chain, runtime.device), stage)
    trained.add_updates(chain, stage, run.recipe.seed)
    linear_map.attach(chain, stage, run.recipe.seed)
    chain.net.load_state_dict({**lora.updates(weights), **linear_map.maps(weights)}, strict=False)
    chain.recompute = run.start.recompute
    if runtime.world > 1:
        names = [n for i in range(stage.first_trainable_block, len(chain.blocks)) for n, m in chain.modules_of(i) if is_batch_norm(m)]
        if stage.spec.norm_stats == "train":
            share_statistics(chain.net, names, runtime.device)
    return chain.train()


@dataclass(frozen=True)
class _FrozenParts:
    """The frozen networks of a stage. finite: their inputs repeat, so their outputs can be cached."""

    prefix: FrozenModel | None
    teacher: FrozenModel | None
    finite: bool


def _frozen(run: Run, stage: StagePlan, chain: Chain, teacher: Chain | None) -> _FrozenParts:
    """Build the frozen prefix and teacher of a stage.

    The prefix is kept outside the strategy, so that it is not cast, sharded or reduced. It is a copy if the strategy shards the chain.
    """
    autocast, finite, prefix = run.runtime.accelerator.autocast, why_not_cacheable(stage) is None, None
    if stage.first_trainable_block > 0 and not chain.runs_whole:
        own = without_suffix(chain, stage.first_trainable_block) if is_sharded(run.runtime) else chain
        prefix = prefix_of(own, stage.first_trainable_block, run.runtime.precision, True, autocast, run.chunk)
    if teacher is None:
        return _FrozenParts(prefix, None, finite)
    return _FrozenParts(prefix, teacher_of(teacher, run.recipe, len(run.images.classes), finite, autocast, run.chunk), finite)


def _spread(run: Run, stage: StagePlan, chain: Chain, state: State) -> Strategy:
    """Build the optimizer, wrap it and the chain in the distributed strategy, and restore the optimizer state."""
    optimizer = optim.make_optimizer(optim.parameter_groups(chain, stage), stage.spec)
    strategy = spread(run.runtime, chain, optimizer, stage.spec.clip, run.start.compile)
    if state.optimizer is not None:
        strategy.load_optimizer_state(state.optimizer)
        strategy.load_extra(state.extra)
    strategy.warm_up(run.student.preprocess.size)
    return strategy


def _context(
    run: Run, stage: StagePlan, state: State, strategy: Strategy, frozen: _FrozenParts, stores: StageStores, stop: StopSignal
) -> StageContext:
    runtime, recipe, start = run.runtime, run.recipe, run.start
    # Training views that never repeat pass through the whole chain. Val has one view per image, so its prefix outputs can be cached.
    entry = InputAdapter(None if stores.train else frozen.prefix, stage.first_trainable_block) if frozen.finite else InputAdapter()
    return StageContext(
        recipe=recipe,
        stage=stage,
        runtime=runtime,
        spread=strategy,
        objective=_objective(run, stage, frozen.teacher),
        entry=entry,
        batches=_train_batches(run, stage, frozen, stores),
        num_micro=run.shard.num_micro,
        solve=None if stage.spec.solve is None else _solver(run, stage, None if stores.train else frozen.prefix, stores),
        val=_val_batches(run, stores) if run.images.val is not None else None,
        val_entry=InputAdapter(None if stores.val else frozen.prefix, stage.first_trainable_block),
        ema=None if stage.spec.ema is None else Ema(strategy, stage.spec.ema, state.ema),
        num_classes=len(run.images.classes),
        stop=stop,
        log=run.log,
        save=run.save,
        save_failed=run.save_failed,
        watch=run.watch,
        check_steps=start.check_steps,
        console=run.console,
        on_step=run.on_step,
        save_seconds=60 * start.save_minutes,
        save_steps=start.save_steps,
    )


def _objective(run: Run, stage: StagePlan, teacher: FrozenModel | None) -> Objective | Matching:
    """Build the objective that the recipe describes: label loss, class weights and distillation; or a teacher's features alone."""
    if teacher is not None and stage.features is not None:
        return Matching(teacher, feature_loss(run.recipe))
    recipe, num_classes, weights_K, distillation = run.recipe, len(run.images.classes), None, None
    labels, several = run.images.train.labels, run.recipe.data.multilabel
    if recipe.data.balance == "weights":
        weights = label_weights(labels) if several else class_weights(labels, num_classes)
        weights_K = torch.from_numpy(weights).float().to(run.runtime.device)
    if teacher is not None and (spec := recipe.distill) is not None:
        together = Together.of(run.runtime, recipe.batch, run.shard.num_micro)
        distillation = Distillation(teacher, objective.distill_loss(spec.loss, num_classes), spec.temperature, spec.weight, together)
    unlabelled = recipe.distill is not None and recipe.distill.unlabelled is not None
    label_loss = objective.label_loss(stage.spec.loss, num_classes, several)
    return Objective(label_loss, stage.spec.label_smoothing, weights_K, distillation, unlabelled)


def _train_batches(run: Run, stage: StagePlan, frozen: _FrozenParts, stores: StageStores) -> Callable[[int], Iterable[Batch]]:
    """A function from a first step to its batches. They hold no images if all outputs that need images are cached."""
    stream, views = _stream(run, stage), run.views(run.images.drawn(stage.taught), stage)
    rows = {name: cached for name, cached in ((FEATURES, stores.train), (TEACHER, stores.teacher)) if cached is not None}
    without_images = stores.train is not None and (frozen.teacher is None or stores.teacher is not None)

    def batches(step: int) -> Iterable[Batch]:
        where = (stream, step, stage.num_steps, run.shard)
        if without_images:
            return Attached(train_positions(views.split.labels, *where, views.mixing), rows)
        return Attached(train_loader(views, *where, run.workers, run.pins), rows)

    return batches


def _solver(run: Run, stage: StagePlan, prefix: FrozenModel | None, stores: StageStores) -> SolveHead:
    """The function that solves the head of a stage. prefix: computes features that are not stored."""
    runtime, images, views = run.runtime, run.images, run.views(run.images.train, stage)
    path, _ = solved.head_of(run.student.chain, stage)
    problem = solved.HeadProblem(runtime, stage, images, run.recipe.data.balance != "none", path, run.recipe.seed)

    def work_out(should_stop: Callable[[], bool]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if stores.train is not None:
            return problem(solved.stored_features(runtime, stores.train, stage, should_stop), should_stop)
        assert prefix is not None
        return problem(solved.computed_features(runtime, prefix, views, stage, run.workers, should_stop), should_stop)

    return work_out


def _val_batches(run: Run, stores: StageStores) -> Iterable[Batch]:
    """Batches of val: images, or cached features."""
    val = run.images.val
    assert val is not None
    if stores.val is None:
        return run.eval_batches(val)
    positions = eval_positions(val.labels, run.shard, run.device_batch, run.recipe.data.eval_limit)
    return Attached(positions, {FEATURES: stores.val})


def _stream(run: Run, stage: StagePlan) -> SampleStream:
    """The order of samples, views and fresh mixing of a stage, as a pure function of the seed and the step."""
    recipe, labels = run.recipe, run.images.drawn(stage.taught).labels
    draw_weights = None
    if recipe.data.balance == "sampler":
        draw_weights = tuple(sampling_weights(labels, len(run.images.classes)).tolist())
    return SampleStream(
        seed=recipe.seed,
        stage=stage.index,
        num_samples=len(labels),
        batch=recipe.batch,
        views=stage.spec.views,
        first_epoch=stage.first_epoch,
        draw_weights=draw_weights,
        mixup=0 if stage.mixes_by_view else stage.spec.mixup,
        cutmix=0 if stage.mixes_by_view else stage.spec.cutmix,
        size=run.student.preprocess.size,
    )


def _blended(run: Run, ctx: StageContext, fit: StageResult) -> tuple[StageResult, dict[str, Tensor]]:
    """Blend the stage's start, as the stage before it wrote it, with its last weights. Logs the curve. Collective."""
    stage, select, step = ctx.stage, ctx.recipe.select, fit.progress.step
    start = read_state(run_dir.stage_weights_file(run.path, run.plan[stage.index - 1].name))
    # A signal is heard at the start of the next stage: the evaluations are short beside it, and are done again by a start that is killed.
    found = blend(ctx.spread, start, stage.spec, lambda: loop.val_figures(ctx, step, lambda: False), select)
    progress, better = fit.progress.after_evaluation(found.figures, select)
    run.log({"kind": "blend", **stage.place(step), **found.figures, "share": found.share, "curve": found.curve, "best": better})
    run.console.say(f"{stage.spec.name:>8}  blend: {found.share:.0%} of its end, {select} {found.figures[select]:.4f} on val")
    if better:
        fit = replace(fit, best=found.weights, progress=progress)
    return fit, found.weights


def save_stage_weights(run: Run, stage: StagePlan, fit: StageResult, last: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write the weights of a finished stage as safetensors. Every rank reads them back from that file for the next stage. Collective."""
    file = run_dir.stage_weights_file(run.path, stage.name)
    if run.runtime.is_main:
        file.parent.mkdir(exist_ok=True)
        manifest.uncover(run.path, [file])
        write_weights(file, fit.best if stage.spec.carry in ("best", "ema") and fit.best is not None else last, run.student.card)
        manifest.cover(run.path, [file])
    best, select = fit.progress.best, run.recipe.select
    unchanged = stage.spec.carry in ("best", "ema") and best is not None and (best.stage, best.step) <= (stage.index, 0)
    row = {"reason": fit.reason, "seconds": fit.progress.seconds, "unchanged": unchanged}
    run.log({"kind": "stage_end", **stage.place(fit.progress.step), **row})
    if fit.reason == "early":
        run.console.say(f"{stage.spec.name:>8}  ends early: {stage.spec.patience} evaluations without a better {select} or a lower loss")
    if unchanged:
        text = f"hands on the weights it started from: on val none of its own has a better {select}, or the same and a lower loss"
        run.console.say(f"{stage.spec.name:>8}  {text}", "yellow")
    run.runtime.barrier()
    return load_file(file)
