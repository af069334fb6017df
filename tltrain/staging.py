"""One stage of a run: built from plain weights, trained, and taken apart into plain weights again."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tltrain import checkpoint, engine, stages
from tltrain.backbones.card import write_weights
from tltrain.blocks import Chain
from tltrain.checkpoint import Progress, State
from tltrain.data import class_weights
from tltrain.data.loader import train_loader
from tltrain.data.order import Stream, num_micro
from tltrain.engine import Fit, Job, Objective
from tltrain.runtime import Stop
from tltrain.setup import Run
from tltrain.stages import PlannedStage


def run_stage(
    run: Run, stage: PlannedStage, progress: Progress, best: dict[str, Tensor] | None,
    optimizer_state: dict[str, Any] | None, teacher: Chain | None, stop: Stop,
) -> tuple[Fit, dict[str, Tensor]]:  # fmt: skip
    """Build a stage from plain weights, train it, and take it apart again. Returns how it ended and its last weights."""
    runtime, chain, recipe = run.runtime, run.student.chain, run.recipe
    stages.freeze(chain, stage)
    optimizer = stages.make_optimizer(stages.parameter_groups(chain, stage), stage.spec)
    model, optimizer = runtime.prepare(chain, optimizer)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    model.train()
    weights_K = None
    if recipe.data.balance == "weights":
        weights_K = torch.from_numpy(class_weights(run.images.train.labels, len(run.images.classes))).float().to(runtime.device)
    micro = num_micro(recipe.batch, runtime.world, run.device_batch)
    stream = _stream(run, stage)
    train_views = run.views(run.images.train, stage.spec.augment)

    def batches(step: int) -> Any:
        return train_loader(train_views, stream, step, stage.num_steps, runtime.rank, runtime.world, micro, run.workers, run.pins)

    def save(state: State) -> None:
        if runtime.is_main:
            checkpoint.save(run.path / "checkpoints", state, run.generation, run.start.keep)

    job = Job(
        recipe=recipe, stage=stage, runtime=runtime, model=model, optimizer=optimizer,
        objective=Objective(recipe, stage.spec.label_smoothing, weights_K, teacher), batches=batches, num_micro=micro,
        val=run.eval_batches(run.images.val) if run.images.val is not None else None, num_classes=len(run.images.classes),
        stop=stop, log=run.log, save=save, console=run.console, save_seconds=60 * run.start.save_minutes, save_steps=run.start.save_steps,
    )  # fmt: skip
    fit = engine.fit(job, progress, best)
    last = runtime.state(model)
    runtime.release(model)
    return fit, last


def _stream(run: Run, stage: PlannedStage) -> Stream:
    recipe, labels = run.recipe, run.images.train.labels
    draw = None
    if recipe.data.balance == "sampler":
        draw = tuple(class_weights(labels, len(run.images.classes))[labels].tolist())
    return Stream(
        seed=recipe.seed, stage=stage.index, num_samples=len(labels), batch=recipe.batch, views=stage.spec.views,
        first_epoch=stage.first_epoch, draw_weights=draw, mixup=stage.spec.mixup, cutmix=stage.spec.cutmix,
        size=run.student.preprocess.size,
    )  # fmt: skip


def hand_on(run: Run, stage: PlannedStage, fit: Fit, last: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a stage that is over, as a file that any tool can load; every process goes on from that file."""
    weights = fit.best if stage.spec.carry == "best" and fit.best is not None else last
    file = run.path / "stages" / stage.name / "weights.safetensors"
    if run.runtime.is_main:
        file.parent.mkdir(exist_ok=True)
        write_weights(file, weights, run.student.card)
    where = {"stage": stage.spec.name, "stage_index": stage.index, "step": fit.progress.step}
    where |= {"run_step": stage.first_step + fit.progress.step, "epoch": stage.epoch(fit.progress.step)}
    run.log({"kind": "stage_end", **where, "reason": fit.reason, "seconds": fit.progress.seconds})
    if fit.reason == "early":
        run.console.say(f"{stage.spec.name:>8}  ends early: {stage.spec.patience} evaluations without a better {run.recipe.select}")
    run.runtime.barrier()
    return load_file(file)
