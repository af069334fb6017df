"""Runs a recipe: executes its stages in order, each starting from the weights of the one before. Resuming takes the same path."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tltrain.cache.frozen import WHOLE
from tltrain.core import files
from tltrain.core.errors import MachineError, StoppedAtOnce
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console, clock
from tltrain.core.output.streams import lasting_output
from tltrain.core.recipe import Recipe
from tltrain.data.dataset import groups_in
from tltrain.data.workers import heard_while_waiting
from tltrain.distributed.out_of_memory import release
from tltrain.distributed.runtime import Runtime, torch_settings_kept
from tltrain.distributed.signals import NoAnswer, StopSignal
from tltrain.evaluation import metrics, results
from tltrain.evaluation.evaluator import answers, logits
from tltrain.evaluation.promises import kept
from tltrain.evaluation.promises.fitted import Fitted, fit_on_val, usual
from tltrain.models.chain import Chain, on_device
from tltrain.models.metadata import write_weights
from tltrain.planning import preview
from tltrain.runs import checkpoint, run_dir
from tltrain.runs.checkpoint import Progress, State
from tltrain.runs.early_end import stop_early
from tltrain.runs.listing.folders import AUTO, check_recipe, run_folder
from tltrain.runs.metrics_log import MetricsLog
from tltrain.runs.report.formatting import learned_nothing
from tltrain.runs.trackers import ANSWER_S, TrackedRun, Trackers, chosen
from tltrain.training import plan_table
from tltrain.training.depths.race import racing_first
from tltrain.training.failures import end_stopped, explain, failure_location, one_at_a_time, record_failure, root_cause, shrink, smaller
from tltrain.training.loop import OnStep, StageResult, ignore_step
from tltrain.training.losses.finite import NotFinite, check_finite
from tltrain.training.setup import TAKEN_OVER, Run, open_run
from tltrain.training.stage import run_stage, save_stage_weights
from tltrain.training.stage_cache import base_images


@racing_first
@one_at_a_time()
@lasting_output()
@torch_settings_kept()
def train(recipe: Recipe, start: RunFlags, on_step: OnStep = ignore_step) -> dict[str, Any]:
    """Train a recipe, or resume its run. Returns the outcome as outcome.json keeps it. Raises UserError.

    on_step(stage, step): called in every process after each optimizer step. step: number of steps completed in the stage.
    """
    path = run_folder(recipe, start)
    check_recipe(path, recipe, start)
    runtime = Runtime(recipe.deterministic, 60 * start.timeout_minutes)
    console = Console(runtime.is_main)
    if start.folder == AUTO:
        console.say(f"folder  {path}")
    finished = run_dir.outcome(path)
    if finished.get("outcome") == "finished":
        if runtime.is_main and not run_dir.report_file(path).exists():  # it was killed before the report was written
            results.report(path, console.say)
        console.say(f"{path} is finished already: see {run_dir.report_file(path)}, or choose another folder with --folder")
        return finished
    if threading.current_thread() is not threading.main_thread():
        console.say("note    in a thread no signal is heard: neither Ctrl-C nor SIGTERM stops this run", style="yellow")
    with StopSignal().listening() as stop, heard_while_waiting(lambda: stop.signal is not None, 54 * start.timeout_minutes):
        try:
            while (ended := _one_start(path, recipe, start, runtime, console, stop, on_step)) is None:
                release()  # free device memory here: no frame of the failed start holds a tensor any more
            return ended
        finally:
            runtime.close()


def _one_start(
    path: Path, recipe: Recipe, start: RunFlags, runtime: Runtime, console: Console, stop: StopSignal, on_step: OnStep
) -> dict[str, Any] | None:
    """Run from the newest checkpoint to the outcome. None: out of memory, and this process can start again with smaller batches."""
    try:
        # Several processes stop together: while images are read, or at their first step.
        with stop.ending_at_once() if runtime.world == 1 else contextlib.nullcontext():
            run = open_run(path, recipe, start, runtime, console, stop)
    except StoppedAtOnce as stopped:
        console.say(f"stopped by {stopped} before the first step; the same command goes on", style="bold")
        return stop_early(path, recipe, start, stopped, writes=runtime.is_main)
    run.on_step, run.stop = on_step, stop
    try:
        return _run_stages(run, stop)
    except NotFinite as error:
        text = f"{error}; the best weights so far are kept. Lower the learning rate, or set clip"
        return record_failure(run, {**failure_location(run), "error": text, "rank": error.rank, "step": error.step})
    except Exception as error:
        if (less := smaller(run, error)) is not None and (ended := shrink(run, less, error))["outcome"] == "stopped":
            return ended if runtime.world > 1 else None  # other ranks may wait in a collective that this one never enters
        if (ended := run_dir.failure(path, run.generation)).get("outcome") == "stopped":
            return end_stopped(run, ended)  # another rank ran out of memory, which caused the error here
        cause = root_cause(run, error)
        record_failure(run, explain(run, cause))
        raise cause from (None if cause is error else error)
    except BaseException as error:  # a hang, a second Ctrl-C, and what else ends a process at once: neither report nor waiting
        text = str(error) if isinstance(error, NoAnswer) else f"ended by {type(error).__name__}; the newest checkpoint stands"
        with contextlib.suppress(OSError):
            run_dir.write_failure(path, run.generation, {**failure_location(run), "error": text})
        if isinstance(error, NoAnswer):
            raise MachineError(text) from None
        raise
    finally:
        with contextlib.closing(run.watch):  # closed last: a disk that does not answer may hold the rest
            run.close_log()
            with contextlib.suppress(OSError):  # on a full disk: the files are then read without checksums
                run.seal()


def _alive(run: Run, call: str) -> Callable[[], bool]:
    """The `should_stop` of an evaluation outside the stages. It reports progress to the watchdog at each batch, and never stops."""
    stage, step, _ = run.watch.place

    def should_stop() -> bool:
        run.watch.at(stage, step, call)
        return False

    return should_stop


def _run_stages(run: Run, stop: StopSignal) -> dict[str, Any]:
    """Restore the newest checkpoint, fill the image cache, and run the remaining stages. Returns the outcome."""
    runtime, checkpoints = run.runtime, run_dir.checkpoints(run.path)
    newest = runtime.share(checkpoint.newest(checkpoints, run.console.say) if runtime.is_main else None)
    restored = None if newest is None else checkpoint.load(newest)
    state = restored or State(Progress(), {name: t.clone() for name, t in run.student.chain.net.state_dict().items()})
    _announce(run, restored)

    def should_stop(where: str) -> bool:
        run.watch.at("", 0, f"fill {where} of base images")
        return stop.signal is not None

    with base_images(run, should_stop):
        return _stages(run, state, stop, resumed=restored is not None)


def _stages(run: Run, state: State, stop: StopSignal, resumed: bool) -> dict[str, Any]:
    """Run the stages from `state` on. Saves a checkpoint after each. Returns the outcome, stopped or finished."""
    runtime = run.runtime
    teacher = on_device(run.teacher.chain, runtime.device) if run.teacher else None
    if teacher is not None and not resumed and not run.recipe.matches_features:
        _evaluate_teacher(run, teacher)
    for stage in run.plan[state.progress.stage :]:
        fit, last = run_stage(run, stage, state, teacher, stop)
        if fit.reason not in ("finished", "early"):
            return _stopped(run, fit)
        state = State(fit.progress.next_stage(), save_stage_weights(run, stage, fit, last), fit.best)
        run.save(state)
    if run.saver is not None:
        run.saver.wait()
    chain = run.student.chain
    chain.net.load_state_dict(state.weights)
    return _finish(run, on_device(chain, runtime.device), state.weights, state.progress)


def _announce(run: Run, restored: State | None) -> None:
    """Print and write the plan, open the metrics log and the trackers, and print where a resumed run continues."""
    runtime, plan_, num_micro, num_classes = run.runtime, run.plan, run.shard.num_micro, len(run.images.classes)
    about = plan_table.describe_data(run.images, run.student, run.strong_views)
    if runtime.device.type == "cuda":
        about += "\n" + plan_table.describe_device(torch.cuda.get_device_name(runtime.device), runtime.precision, runtime.tf32)
    about += f"\n{run.timed}" if run.timed else ""
    table = plan_table.render(run.recipe, run.student.chain, plan_, runtime.world, num_micro, about, run.choices.lines(), num_classes)
    if not runtime.is_main:
        return
    origin = list(restored.progress.order) if restored else None
    run.metrics_log = MetricsLog(run.path, run.generation, {"from": origin, "world": runtime.world})
    run.trackers = _open_trackers(run)
    run_dir.write_plan(run.path, plan_table.text(table))
    run.trackers.plan(plan_table.text(table))
    if (picture := _preview(run)) is not None:
        run.trackers.preview(picture)
    run.console.show_plan(table)
    if restored is not None:
        at = restored.progress
        where = plan_[at.stage].spec.name if at.stage < len(plan_) else "the end"
        run.console.say(f"resume  from stage {where}, step {at.step}", style="bold")


def _open_trackers(run: Run) -> Trackers:
    """Open the trackers of this start. The time to wait for an answer stays below the time-out of the other ranks, which wait here."""
    limit_s = min(ANSWER_S, 30 * run.start.timeout_minutes)
    opened = Trackers(chosen(run.start), run.console.say, limit_s, lambda: run.stop.signal is not None)
    steps = [stage.num_steps for stage in run.plan]
    opened.open(TrackedRun(run.path, run.path.name, run.recipe.model_dump(mode="json"), steps, run.start, run.console.say))
    return opened


def _preview(run: Run) -> Path | None:
    """Draw preview.png of the run folder once. An error is printed and does not stop the run. Returns None then."""
    out = run_dir.preview_file(run.path)
    try:
        if not out.exists():
            files.write_atomic(out, preview.picture(run.recipe, run.images, run.student.preprocess, run.plan))
        return out
    except Exception as error:  # matplotlib may raise anything for a font or an image; training reports a bad image itself
        run.console.say(f"preview could not be drawn: {type(error).__name__}: {error}", style="yellow")
        return None


def _evaluate_teacher(run: Run, teacher: Chain) -> None:
    """Evaluate the teacher before training, so that the user sees a bad teacher at once."""
    split = run.images.val or run.images.train
    predictions = answers(run.runtime, teacher, run.eval_batches(split), should_stop=_alive(run, "teacher"))
    figures = metrics.summary(predictions, len(run.images.classes))
    run.log({"kind": "teacher", **run.plan[0].place(0), "stage": "teacher", "split": split.name, **figures})
    if run.recipe.distill is not None and run.recipe.distill.ensemble:
        run.console.say(f"teacher {plan_table.taught_by(run.recipe)}")
    name, share = ("mAP", figures["map"] or float("nan")) if run.recipe.data.multilabel else ("top-1", figures["top1"])
    run.console.say(f"teacher {name} {100 * share:.1f} % of {figures['n']:,} {split.name} images, loss {figures['loss']:.4f}")


def _stopped(run: Run, fit: StageResult) -> dict[str, Any]:
    """End a run that a signal stopped: wait for its checkpoint, then write the best weights, the outcome and the report."""
    stage = run.plan[fit.progress.stage].spec.name
    details: dict[str, Any] = {"outcome": "stopped", "signal": fit.reason, "stage": stage, "step": fit.progress.step}
    if fit.reason == TAKEN_OVER or run.saver is None:
        return details
    run.saver.wait()
    if fit.best is not None:
        write_weights(run_dir.weights_file(run.path), fit.best, run.student.card)
    run_dir.write_outcome(run.path, run.generation, details)
    results.report(run.path, run.console.say)
    run.console.say(f"stopped by {fit.reason} in stage {stage}, step {fit.progress.step}, and saved", style="bold")
    run.console.say("the same command goes on from there")
    return details


def _finish(run: Run, chain: Chain, weights: dict[str, Tensor], progress: Progress) -> dict[str, Any]:
    """Calibrate and test the final weights once, then write the weights, the test results, the outcome and the report."""
    began, last = clock(), run.plan[-1]
    searches = last.spec.schedule == "range"  # for a learning rate, until the loss explodes: what it found is the answer, and no figures
    fitted = _fit_on_val(run, chain)
    test, rules = run.images.test, usual(fitted.val)
    if test is not None:
        predictions = answers(run.runtime, chain, run.eval_batches(test), fitted.temperature, WHOLE, _alive(run, "test"), rules.thresholds)
        check_finite(predictions, "test", last, last.num_steps)
        predictions = metrics.with_groups(predictions, groups_in(run.images, test), fitted.thresholds)
    if run.runtime.is_main:
        write_weights(run_dir.weights_file(run.path), weights, fitted.on(run.student.card))
        if fitted.val is not None:
            kept.write_val(run.path, fitted.val)
    if test is not None:
        figures = metrics.summary(predictions, len(run.images.classes))
        run.log({"kind": "test", **last.place(last.num_steps), **figures})
        if run.runtime.is_main:
            seconds = progress.seconds + clock() - began
            details: dict[str, Any] = {"weights": last.spec.carry, "seconds": seconds}
            details |= metrics.details(predictions, run.images.classes, run.recipe.data.depth)
            details |= metrics.doubts(predictions, rules.sets, rules.abstentions, run.images.classes, rules.val)
            images = test, run.views(test), run.images.classes
            results.write_test(run.path, {"split": "test", **figures, **details}, predictions, *images, chain)
            if "confusion" in details:
                run.trackers.confusion(details["confusion"], list(run.images.classes))
            run.trackers.mistakes(run_dir.mistakes(run.path))
            run.trackers.summary({f"test/{k}": v for k, v in figures.items()})
            if not searches:
                run.console.say(results.test_line(figures, seconds), style="bold")
            if not searches and (nothing := learned_nothing({**figures, **details})) is not None:
                run.console.say(nothing, style="yellow")
    details = {"outcome": "finished", "seconds": progress.seconds + clock() - began, "peak_bytes": run.runtime.peak_bytes()}
    if run.runtime.is_main:
        run_dir.write_outcome(run.path, run.generation, details)
        page = results.report(run.path, run.console.say)
        if not searches:
            run.console.say(f"report  {page}")
        if page is not None:
            run.trackers.report(page)
        if len(run.trackers) > 0:
            run.trackers.weights(run_dir.weights_file(run.path), run.recipe.name, _teacher(run.recipe))
    return details


def _fit_on_val(run: Run, chain: Chain) -> Fitted:
    """Calibrate the final weights on val. Collective."""
    alive = _alive(run, "calibrate")
    return fit_on_val(
        run.images,
        lambda val: logits(run.runtime, chain.eval(), run.eval_batches(val), alive),
        lambda val: answers(run.runtime, chain.eval(), run.eval_batches(val), should_stop=alive),
    )


def _teacher(recipe: Recipe) -> tuple[Path, str] | None:
    """(weights, name) of one teacher that is itself a run, else None. Trackers use this name for the artifact of that run too."""
    folder_ = Path((recipe.distill.teacher.weights if recipe.distill and not recipe.distill.ensemble else None) or "")
    weights = run_dir.weights_file(folder_)
    return (weights, run_dir.read_recipe(folder_).name) if weights.is_file() and run_dir.recipe_file(folder_).is_file() else None
