"""One stage of a run: built from plain weights, trained, and taken apart into plain weights again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tltrain import engine, stages
from tltrain.backbones.card import write_weights
from tltrain.batchnorm import share_statistics
from tltrain.blocks import Chain, is_batch_norm
from tltrain.checkpoint import Progress, State
from tltrain.data import class_weights
from tltrain.data.loader import train_loader
from tltrain.data.order import Stream, num_micro
from tltrain.engine import Fit, Job, Objective
from tltrain.runtime import Stop
from tltrain.setup import Run
from tltrain.spread import Spread, spread
from tltrain.stages import PlannedStage


def run_stage(
    run: Run,
    stage: PlannedStage,
    progress: Progress,
    weights: dict[str, Tensor],
    best: dict[str, Tensor] | None,
    restored: State | None,
    teacher: Chain | None,
    stop: Stop,
) -> tuple[Fit, dict[str, Tensor]]:
    """Build a stage from plain weights, train it, and leave nothing of it behind. Returns how it ended and its last weights."""
    spreaded = _build(run, stage, weights, restored)
    job = _job(run, stage, spreaded, teacher, stop)
    fit = engine.fit(job, progress, best)
    last = spreaded.weights()
    spreaded.close()
    return fit, last


def _build(run: Run, stage: PlannedStage, weights: dict[str, Tensor], restored: State | None) -> Spread:
    """A fresh chain with these weights, frozen and spread as the stage wants it."""
    runtime = run.runtime
    chain = copy.deepcopy(run.student.chain)
    chain.net.load_state_dict(weights)
    chain.to(runtime.device)
    stages.freeze(chain, stage)
    if runtime.world > 1:
        names = [n for i in range(stage.first, len(chain.blocks)) for n, m in chain.modules_of(i) if is_batch_norm(m)]
        if stage.spec.norm_stats == "train":
            share_statistics(chain.net, names, runtime.device)
    chain.train()
    made = stages.make_optimizer(stages.parameter_groups(chain, stage), stage.spec)
    spreaded = spread(runtime, chain, made, stage.spec.clip)
    if restored is not None and restored.optimizer is not None:
        spreaded.load_optimizer_state(restored.optimizer)
        spreaded.load_extra(restored.extra)
    spreaded.warm_up(run.student.preprocess.size)
    return spreaded


def _job(run: Run, stage: PlannedStage, spreaded: Spread, teacher: Chain | None, stop: Stop) -> Job:
    runtime, recipe, start, num_classes = run.runtime, run.recipe, run.start, len(run.images.classes)
    weights_K = None
    if recipe.data.balance == "weights":
        weights_K = torch.from_numpy(class_weights(run.images.train.labels, num_classes)).float().to(runtime.device)
    micro = num_micro(recipe.batch, runtime.world, run.device_batch)
    stream, train_views = _stream(run, stage), run.views(run.images.train, stage.spec.augment)

    def batches(step: int) -> Any:
        return train_loader(train_views, stream, step, stage.num_steps, runtime.rank, runtime.world, micro, run.workers, run.pins)

    return Job(
        recipe=recipe,
        stage=stage,
        runtime=runtime,
        spread=spreaded,
        objective=Objective(recipe, stage.spec.label_smoothing, weights_K, teacher),
        batches=batches,
        num_micro=micro,
        val=run.eval_batches(run.images.val) if run.images.val is not None else None,
        num_classes=num_classes,
        stop=stop,
        log=run.log,
        save=run.save,
        save_failed=run.save_failed,
        watch=run.watch,
        check_steps=start.check_steps,
        console=run.console,
        save_seconds=60 * start.save_minutes,
        save_steps=start.save_steps,
    )


def _stream(run: Run, stage: PlannedStage) -> Stream:
    recipe, labels = run.recipe, run.images.train.labels
    draw = None
    if recipe.data.balance == "sampler":
        draw = tuple(class_weights(labels, len(run.images.classes))[labels].tolist())
    return Stream(
        seed=recipe.seed,
        stage=stage.index,
        num_samples=len(labels),
        batch=recipe.batch,
        views=stage.spec.views,
        first_epoch=stage.first_epoch,
        draw_weights=draw,
        mixup=stage.spec.mixup,
        cutmix=stage.spec.cutmix,
        size=run.student.preprocess.size,
    )


def hand_on(run: Run, stage: PlannedStage, fit: Fit, last: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a stage that is over, as a file that any tool can load; every process goes on from that file."""
    file = run.path / "stages" / stage.name / "weights.safetensors"
    if run.runtime.is_main:
        file.parent.mkdir(exist_ok=True)
        write_weights(file, fit.best if stage.spec.carry == "best" and fit.best is not None else last, run.student.card)
    where = {"stage": stage.spec.name, "stage_index": stage.index, "step": fit.progress.step}
    where |= {"run_step": stage.first_step + fit.progress.step, "epoch": stage.epoch(fit.progress.step)}
    run.log({"kind": "stage_end", **where, "reason": fit.reason, "seconds": fit.progress.seconds})
    if fit.reason == "early":
        run.console.say(f"{stage.spec.name:>8}  ends early: {stage.spec.patience} evaluations without a better {run.recipe.select}")
    run.runtime.barrier()
    return load_file(file)
