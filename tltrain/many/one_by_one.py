"""Trains runs one after the other in this process. Finished ones are skipped, and a stopped one goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.distributed.signals import StopSignal
from tltrain.training.run import train


@dataclass(frozen=True)
class OneRun:
    """A run to train. Its flags name its folder."""

    name: str
    recipe: Recipe
    start: RunFlags


def train_one_by_one(runs: Sequence[OneRun], say: Callable[[str], None], past_failures: bool = False) -> str:
    """Train the runs in their order. Returns finished, or the outcome of the first that did not finish: the rest is then not begun.

    past_failures: a run that fails, such as by a loss that is not finite, does not keep the rest from being trained.

    A signal stops the run that trains, with its checkpoint; between two runs it stops before the next. Raises UserError.
    """
    failed = False
    with StopSignal().listening() as between:
        for number, run in enumerate(runs, start=1):
            if between.signal is not None:
                say(f"stopped by {between.signal}; the same command goes on with {run.name}")
                return "stopped"
            say(f"{run.name}    {number} of {len(runs)}, into {run.start.folder}")
            outcome = str(train(run.recipe, run.start)["outcome"])
            if outcome != "finished" and not (past_failures and outcome == "failed"):
                return outcome
            failed = failed or outcome == "failed"
    return "failed" if failed else "finished"
