"""Failure handling: records the error and where it happened.

After an out-of-memory error, it halves the micro-batch, or the chunk of frozen networks, for the next start.
"""

from __future__ import annotations

import contextlib
import errno
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tltrain.core import files
from tltrain.core.errors import AFTER_THE_END, UserError
from tltrain.data.workers import refuse_in_worker
from tltrain.distributed.out_of_memory import ChunkTooLarge, is_out_of_memory, without_advice
from tltrain.distributed.strategies.consistency import ConsistencyError
from tltrain.evaluation import results
from tltrain.runs import run_dir
from tltrain.runs.run_dir import OUT_OF_MEMORY
from tltrain.training.loop import SaveFailed
from tltrain.training.setup import Run

_TRAINING = threading.Lock()

TRAINING = ("train", "agree", "save", "hand on")


EVALUATION = ("evaluate", "teacher", "test", "calibrate")
"""Phases of a run (as given to `Watch.at`) whose memory use depends on the number of images in a forward pass."""


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """One run at a time in a process. Raises UserError for a second one, and where the main program has ended meanwhile."""
    if not _TRAINING.acquire(blocking=False):
        raise UserError(
            "another training goes on in this process, and torch's settings are the process's; wait for it, or start a second process"
        )
    try:
        refuse_in_worker()
        yield
    except RuntimeError as error:
        if threading.main_thread().is_alive():
            raise
        raise UserError(AFTER_THE_END) from error
    finally:
        _TRAINING.release()


def smaller(run: Run, error: BaseException) -> dict[str, int] | None:
    """The reduced flags to keep after an out-of-memory error. None for any other error, or if nothing can be reduced."""
    if not is_out_of_memory(error) or run.watch.taken_over:
        return None
    if isinstance(error, ChunkTooLarge):
        return {"chunk": error.chunk // 2} if error.chunk > 1 else None
    images = _at_a_time(run)
    if images < 2:
        return None
    requested = run.start.max_device_batch or run_dir.kept(run.path).get("too_large")
    return {"max_device_batch": images // 2} | ({} if requested is None else {"too_large": requested})


def _at_a_time(run: Run) -> int:
    """Images on this process's device at once in its current phase. 0 if the memory use of the phase does not depend on it."""
    call, world, batch = run.watch.place[2], run.runtime.world, run.recipe.batch
    if call in TRAINING:
        return math.ceil(math.ceil(batch / world) / run.shard.num_micro)
    if call not in EVALUATION:
        return 0
    splits = [split for split in (run.images.val, run.images.test) if split is not None] or [run.images.train]
    most = max(min(len(split), run.recipe.data.eval_limit or len(split)) for split in splits)
    return min(run.device_batch, math.ceil(most / world))


def shrink(run: Run, less: dict[str, int], error: BaseException) -> dict[str, Any]:
    """After an out-of-memory error: save the reduced flags and record this start as stopped. The next start uses them.

    Returns the outcome, or that of another rank that recorded one first.
    """
    run_dir.keep(run.path, less)
    stage, step, call = run.watch.place
    new = less.get("max_device_batch")
    what = f"micro-batches of at most {new} images" if new else f"chunks of {less['chunk']} images in what is frozen"
    where = f"rank {run.runtime.rank}, " if run.runtime.world > 1 else ""
    text = f"out of memory ({where}stage {stage}, step {step}, {call}: {without_advice(error)}); from here on {what}"
    details = {"outcome": "stopped", "signal": OUT_OF_MEMORY, "rank": run.runtime.rank, "stage": stage, "step": step, "call": call}
    return end_stopped(run, run_dir.write_failure(run.path, run.generation, {**details, "error": text}))


def end_stopped(run: Run, details: dict[str, Any]) -> dict[str, Any]:
    """End a start after an out-of-memory error. Waits for the checkpoint being written, so that the next start finds it complete."""
    if details["outcome"] == "stopped":
        run.console.say(f"memory  {details['error']}", style="bold yellow")
        if run.runtime.world > 1:
            run.console.say("the same command goes on from the newest checkpoint")
    if run.saver is not None:
        run.saver.wait()
    return details


def too_large(run: Run, error: BaseException) -> UserError:
    """The error to raise if nothing can be reduced automatically. It lists what the user can change."""
    stage, step, call = run.watch.place
    what = "one image at a time" if _at_a_time(run) or isinstance(error, ChunkTooLarge) else "the network"
    return UserError(
        f"the device has no room for {what} (stage {stage or '-'}, step {step}, {call}): {without_advice(error)}; use --recompute, a "
        "smaller data.size or backbone, unfreeze fewer blocks, keep caches off the device (--cache-device-gb 0), or spread the network by "
        "fsdp2 or zero3"
    )


def root_cause(run: Run, error: Exception) -> Exception:
    """The cause of an error: an error of the background checkpoint writer, a full or read-only disk, or a device out of memory."""
    if is_out_of_memory(error):
        return too_large(run, error)
    if isinstance(error, SaveFailed) and run.saver is not None:
        try:
            run.saver.wait()
        except Exception as cause:  # any error of the writer is the cause
            return cause
    full = isinstance(error, SafetensorError) and "os error" in str(error)
    if isinstance(error, OSError):
        inside = error.filename is not None and Path(str(error.filename)).is_relative_to(run.path)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or (inside and error.errno in (errno.EPERM, errno.EACCES))
    if full:
        return UserError(f"{run.path} cannot be written: {error}; what stands there is untouched. {files.remedy(error)}")
    if isinstance(error, OSError) and error.errno == errno.ENOENT and not run.watch.present():
        return UserError(f"{run.path} was renamed or deleted while the run went on, which ends here; put it back, and start again")
    return error


def explain(run: Run, error: Exception) -> dict[str, Any]:
    """The details of a failure for outcome.json: the error with its rank, stage, step and phase."""
    may_be_gone = isinstance(error, RuntimeError) and not isinstance(error, ConsistencyError)  # a ConsistencyError already names its cause
    gone = run.watch.missing() if may_be_gone and run.runtime.world > 1 else None
    if gone is not None:
        return {**gone, "error": f"{gone['error']} ({type(error).__name__} on rank {run.runtime.rank}: {error})"}
    here = failure_location(run)
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return {**here, "error": f"{text} (rank {here['rank']}, stage {here['stage']}, step {here['step']}, {here['call']})"}


def failure_location(run: Run) -> dict[str, Any]:
    """Where this process failed: rank, stage, step and phase."""
    stage, step, call = run.watch.place
    return {"outcome": "failed", "rank": run.runtime.rank, "stage": stage, "step": step, "call": call}


def record_failure(run: Run, details: dict[str, Any]) -> dict[str, Any]:
    """Record the failure unless another rank recorded one first. Returns the recorded details. Rank 0 also writes the report."""
    try:
        details = run_dir.write_failure(run.path, run.generation, details)
    except OSError as error:  # the disk may be what failed
        run.console.say(f"outcome.json could not be written: {error}", style="bold red")
    if run.saver is not None:
        with contextlib.suppress(Exception):  # the checkpoint that is being written is worth a while; its error is not the first
            run.saver.wait()
    if run.runtime.is_main:
        try:
            results.report(run.path, run.console.say)
        except (OSError, ValueError) as error:
            run.console.say(f"the report could not be written: {error}", style="bold red")
        run.console.say(f"failed: {details['error']}", style="bold red")
    return details
