"""Outcomes of starts that end before their first step: an error or a stop between the claim of the run folder and the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tltrain.core.errors import StoppedAtOnce, UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.runs import run_dir


@contextmanager
def recorded(path: Path, generation: int, rank: int) -> Iterator[None]:
    """Inside, an error before there is a Run is recorded as the outcome of this start."""
    place = {"rank": rank, "stage": "", "step": 0, "call": "start"}
    try:
        yield
    except StoppedAtOnce as stopped:
        with suppress(OSError):
            run_dir.write_outcome(path, generation, {"outcome": "stopped", "signal": str(stopped), **place})
        stopped.recorded = True
        raise
    except BaseException as error:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # the disk may be what failed
            run_dir.write_failure(path, generation, {"outcome": "failed", "error": text, **place})
        raise


def stop_early(path: Path, recipe: Recipe, start: RunFlags, stopped: StoppedAtOnce, writes: bool = True) -> dict[str, Any]:
    """The outcome of a start that a signal ended before its first step. It is written, by one process, unless the run is another's."""
    details = {"outcome": "stopped", "signal": str(stopped), "stage": "", "step": 0}
    with suppress(OSError, UserError):
        if writes and not stopped.recorded:
            run_dir.check_owner(path, start.take_over, start.stale_seconds)
            run_dir.create(path, recipe)
            run_dir.write_outcome(path, run_dir.claim(path), details)
    return details
