"""The training loop of one stage. `fit` agrees with the other ranks, evaluates, saves and takes the next step, in this order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tltrain.cache.frozen import InputAdapter
from tltrain.core.errors import UserError
from tltrain.core.output.console import Console, clock
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data.loader import on_device
from tltrain.data.mixing import apply_mixup
from tltrain.data.sampler import derive_seed
from tltrain.data.views import Batch
from tltrain.distributed.consensus import FlagAllReduce
from tltrain.distributed.runtime import Runtime
from tltrain.distributed.signals import StopSignal
from tltrain.distributed.strategies import Strategy
from tltrain.distributed.strategies.consistency import Guard
from tltrain.distributed.watchdog import CALLER, Watch
from tltrain.evaluation import metrics
from tltrain.evaluation.evaluator import Interrupted, answers
from tltrain.runs.checkpoint import Progress, State
from tltrain.training.losses.finite import LossWatch, check_finite
from tltrain.training.optim import set_lr
from tltrain.training.weights import lora
from tltrain.training.weights.ema import Ema


class SaveFailed(RuntimeError):
    """A checkpoint could not be written. The process that wrote it holds the cause."""


OnStep = Callable[[str, int], None]
"""Called after each optimizer step with the name of the stage and the number of steps completed in it."""


SolveHead = Callable[[Callable[[], bool]], tuple[dict[str, Tensor], dict[str, Any]]]
"""(should_stop) -> (the head's weights by their names in the net, values of its row in the log). Raises Interrupted. Collective."""


def ignore_step(stage: str, step: int) -> None:
    """The default hook: does nothing."""


@dataclass
class StageContext:
    """Everything the training loop needs for one stage."""

    recipe: Recipe
    stage: StagePlan
    runtime: Runtime
    spread: Strategy
    objective: Callable[[Tensor, Batch], Tensor]
    """Called with what the network gives of a batch. The loss (B,)."""
    entry: InputAdapter
    batches: Callable[[int], Iterable[Batch]]
    """Called with a first step. Gives num_micro micro-batches of this rank for that step and each later one."""
    num_micro: int
    val: Iterable[Batch] | None
    val_entry: InputAdapter
    ema: Ema | None
    num_classes: int
    stop: StopSignal
    log: Callable[[dict[str, Any]], None]
    save: Callable[[State], None]
    solve: SolveHead | None
    """Works out the head of a stage that is solved. None: the stage trains."""
    save_failed: Callable[[], bool]
    """Whether the checkpoint being written has failed."""
    watch: Watch
    check_steps: int
    console: Console
    on_step: OnStep
    save_seconds: float
    save_steps: int | None


@dataclass
class StageResult:
    """The result of a stage."""

    progress: Progress
    best: dict[str, Tensor] | None
    reason: str
    """Why the stage ended: one of `ENDED`, or the name of the signal that stopped it."""


ENDED = ("finished", "early")  # early: no improvement for `patience` evaluations
STOP, SAVE, BAD, ERROR = range(4)  # the flags that ranks all-reduce


def fit(ctx: StageContext, progress: Progress, best: dict[str, Tensor] | None) -> StageResult:
    """Train one stage from a position to its end, or until a stop is requested. Raises NotFinite and SaveFailed."""
    stage, loop, guard = ctx.stage, _TrainLoop(ctx, progress), Guard(ctx.runtime, ctx.spread)
    agreement = loop.agreement
    first = progress.step
    began, seconds_before, last_save = clock(), progress.seconds, clock()
    ctx.console.open_stage(stage.spec.name, progress.step, stage.num_steps)
    try:
        while True:
            # Decide what is due before this step. A resumed run enters here too and decides the same.
            step = progress.step
            evaluates = stage.evaluates_after(step) and not progress.evaluated and ctx.val is not None
            saves = ctx.save_steps is not None and step % ctx.save_steps == 0 and 0 < step < stage.num_steps
            ctx.watch.at(stage.spec.name, step, "agree")
            # All ranks must act alike. Sum their flags asynchronously, one step late. Sum them at once only if the ranks wait here anyway.
            flags = [ctx.stop.requested, int(clock() - last_save > ctx.save_seconds), loop.watched.bad, int(ctx.save_failed())]
            sums = agreement.sum_now(flags) if evaluates or saves or step == stage.num_steps else agreement.sum_previous(flags)
            if sums[BAD]:
                raise loop.watched.error(ctx.runtime, stage)
            if sums[ERROR]:
                raise SaveFailed("a checkpoint could not be written")
            if evaluates and not sums[STOP]:
                try:
                    progress, best = loop.evaluate(progress, best, loop.stopping)
                except Interrupted:
                    sums[STOP] = 1
            progress = replace(progress, seconds=seconds_before + clock() - began)
            over = step == stage.num_steps or (stage.spec.patience is not None and progress.stale >= stage.spec.patience)
            if sums[STOP] or ((saves or sums[SAVE]) and not over):
                # Losses reach the host late. Wait for them, so that no checkpoint holds weights that are not finite.
                if agreement.sum_now([0, 0, loop.watched.settle(), 0])[BAD]:
                    raise loop.watched.error(ctx.runtime, stage)
                progress = loop.save(progress, best)
                last_save = clock()
            if sums[STOP]:
                return StageResult(progress, best, ctx.stop.signal or "a signal to another process")
            if over:
                guard.replicas(step)
                guard.finish(ctx.spread.weights(), stage, range(first, step))
                return StageResult(progress, best, "finished" if step == stage.num_steps else "early")
            progress = loop.advance(progress)
            if step <= first + 1 or progress.step % ctx.check_steps == 0:  # a new head is zero: no gradient below it in step 1
                guard.replicas(progress.step)
    finally:
        ctx.console.close_stage()


def val_figures(ctx: StageContext, step: int, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """Metrics on val of the network as it stands after `step` steps. Raises NotFinite, Interrupted, and UserError where `select` has no
    value. Collective."""

    def alive() -> bool:
        ctx.watch.at(ctx.stage.spec.name, step, "evaluate")  # at each batch, since an evaluation may exceed the time-out
        return should_stop()

    assert ctx.val is not None
    predictions = answers(ctx.runtime, ctx.spread.model, ctx.val, entry=ctx.val_entry, should_stop=alive)
    check_finite(predictions, "val", ctx.stage, step)
    figures = metrics.summary(predictions, ctx.num_classes)
    if figures[ctx.recipe.select] is None:
        told = f"select is {ctx.recipe.select}, which has no value for these {len(predictions.position)} predictions"
        raise UserError(f"{told}; choose another metric")
    return figures


def carried_weights(ctx: StageContext) -> dict[str, Tensor]:
    """Plain weights of the network as it stands, or of its average where the stage carries that. Collective. Complete on process 0."""
    with ctx.ema.applied() if ctx.ema is not None and ctx.stage.spec.carry == "ema" else contextlib.nullcontext():
        return lora.merged(ctx.spread.weights(), ctx.stage.spec)


class _TrainLoop:
    """The actions of `fit`: one optimizer step, one evaluation, one save."""

    def __init__(self, ctx: StageContext, progress: Progress) -> None:
        self.ctx, self.agreement = ctx, FlagAllReduce(ctx.runtime, 4)
        self.batches: Iterator[Batch] | None = None
        self.shares: list[Tensor] = []  # this rank's part of each step's loss since the last row, on the device
        self.watched = LossWatch(progress.step)
        self.clock, self.num_images = clock(), 0  # since the last training row or evaluation

    def advance(self, progress: Progress) -> Progress:
        """The next step: of the optimizer, or the one in which the head is solved. The same position where a stop was requested in that."""
        if self.ctx.solve is not None:
            with contextlib.suppress(Interrupted):
                return self.solve(progress, self.ctx.solve)
            return progress
        # Open the batches only now: a stage that is already over needs no data workers.
        self.batches = self.batches or on_device(self.ctx.batches(progress.step), self.ctx.runtime.device)
        return self.train(progress, self.batches)

    def stopping(self) -> bool:
        """Whether a process has been asked to stop, as all know at once. Collective."""
        return self.agreement.sum_previous([self.ctx.stop.requested, 0, 0, 0])[STOP] > 0

    def train(self, progress: Progress, batches: Iterator[Batch]) -> Progress:
        """One optimizer step on the global batch of `progress.step`, accumulated over this rank's micro-batches."""
        ctx, stage, runtime, step = self.ctx, self.ctx.stage, self.ctx.runtime, progress.step
        set_lr(ctx.spread.optimizer, stage.lr_factor(step))
        shares = []
        for micro in range(ctx.num_micro):
            ctx.watch.at(stage.spec.name, step, "train")
            batch = apply_mixup(next(batches))
            # Dropout depends only on seed, stage, step, micro-batch and rank, so a resumed run repeats it.
            runtime.seed(derive_seed(ctx.recipe.seed, "dropout", stage.index, step, micro, runtime.rank))
            last = micro == ctx.num_micro - 1
            # DDP and FSDP2 reduce gradients over ranks after the last micro-batch only.
            with ctx.spread.accumulating(last):
                loss_B = ctx.objective(ctx.spread.model(*ctx.entry(batch)), batch)
                # Divide by the global batch size, so that the micro-batches of all ranks sum to the mean.
                loss = (loss_B * batch["weight"]).sum() / stage.batch
                whole = loss * runtime.world if runtime.world > 1 else loss  # gradients are averaged over processes
                ctx.spread.backward(whole, last)
            shares.append(loss.detach())
        norm = ctx.spread.step()
        if ctx.ema is not None:
            ctx.ema.update(step)
        self._watch(step, sum(shares[1:], shares[0]))
        ctx.console.step()
        ctx.watch.at(stage.spec.name, step, CALLER)
        ctx.on_step(stage.spec.name, step + 1)
        ctx.watch.at(stage.spec.name, step, "train")
        progress = replace(progress, step=step + 1, evaluated=False)
        return self._log_row(progress, norm) if progress.step % stage.log_steps == 0 or progress.step == stage.num_steps else progress

    def solve(self, progress: Progress, work_out: SolveHead) -> Progress:
        """The one step of a stage whose head is solved. Raises Interrupted where a stop is requested, and changes nothing then."""
        ctx, name = self.ctx, self.ctx.stage.spec.name

        def alive() -> bool:
            ctx.watch.at(name, progress.step, "solve")
            return self.stopping()

        weights, row = work_out(alive)
        ctx.spread.put(weights)
        progress = replace(progress, step=progress.step + 1, evaluated=False)
        ctx.log({"kind": "solve", **ctx.stage.place(progress.step), **row})
        ctx.console.say(f"{name:>8}  {'; '.join(row['notes'])}")
        ctx.console.step()
        ctx.watch.at(name, progress.step, CALLER)
        ctx.on_step(name, progress.step)
        return progress

    def evaluate(
        self, progress: Progress, best: dict[str, Tensor] | None, should_stop: Callable[[], bool]
    ) -> tuple[Progress, dict[str, Tensor] | None]:
        """Evaluate on val, log a row, and keep the best weights. If `should_stop` returns True, raises Interrupted and changes nothing."""
        ctx, select, step = self.ctx, self.ctx.recipe.select, progress.step
        figures, beside = val_figures(ctx, step, should_stop), {}
        if ctx.ema is not None:
            with ctx.ema.applied():
                averaged = val_figures(ctx, step, should_stop)
            carried = ctx.stage.spec.carry == "ema"
            figures, other = (averaged, figures) if carried else (figures, averaged)
            beside = {f"{'last' if carried else 'ema'}_{name}": value for name, value in other.items() if name != "n"}
        progress, better = progress.after_evaluation(figures, select)
        if better:
            best = carried_weights(ctx)
        row = {"kind": "val", **self.ctx.stage.place(step), **figures, **beside, "best": better}
        ctx.log(row)
        ctx.console.evaluation(row, ctx.stage.epoch(ctx.stage.num_steps))
        self.clock, self.num_images = clock(), 0
        return progress, best

    def save(self, progress: Progress, best: dict[str, Tensor] | None) -> Progress:
        """Collect the state of the stage and pass it to `ctx.save`."""
        self.ctx.watch.at(self.ctx.stage.spec.name, progress.step, "save")
        progress = self._collect(progress)
        spread, ema = self.ctx.spread, None if self.ctx.ema is None else self.ctx.ema.state()
        self.ctx.save(State(progress, spread.weights(), best, spread.optimizer_state(), spread.extra(), ema))
        return progress

    def _log_row(self, progress: Progress, norm: Any) -> Progress:
        """Log the mean loss since the last row. Apart from evaluation and saving, the host waits for the device only here."""
        progress = self._collect(progress)
        loss = sum(progress.losses) / len(progress.losses)
        images_per_s = self.num_images / max(clock() - self.clock, 1e-9)
        lr = self.ctx.stage.lr * self.ctx.stage.lr_factor(progress.step - 1)
        row = {"loss": loss, "lr": lr, "grad_norm": None if norm is None else float(norm), "images_per_s": images_per_s}
        self.ctx.log({"kind": "train", **self.ctx.stage.place(progress.step), **row})
        self.ctx.console.figures(loss, images_per_s)
        self.clock, self.num_images = clock(), 0
        return replace(progress, losses=())

    def _collect(self, progress: Progress) -> Progress:
        """Append the global loss of each step since the last row. Kept per step, so that a save does not change the mean."""
        if not self.shares:
            return progress
        shares_1S = torch.stack(self.shares).double().unsqueeze(0)
        self.shares = []
        return replace(progress, losses=(*progress.losses, *self.ctx.runtime.gather(shares_1S).sum(0).tolist()))

    def _watch(self, step: int, share: Tensor) -> None:
        """Count a step's loss in, and have it looked at once it is on the host."""
        self.shares.append(share)
        self.num_images += self.ctx.stage.batch
        self.watched.add(step, share)
