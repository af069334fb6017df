"""Trials in worlds of processes: stopped and gone on with, and what they ended with."""

from __future__ import annotations

from pathlib import Path

from benchmarks import world
from benchmarks.world import Trial


def stop_and_go_on(trial: Trial, num_steps: int, rank: int = 0) -> Path:
    """Stop a trial after a number of steps, then start it again until it ends."""
    stopped = Trial(**{**trial.__dict__, "before": "signal_after", "arguments": (num_steps, rank)})
    codes = world.run(stopped)
    assert set(codes) <= {75, 0}, f"{codes}\n{world.log(stopped)}"
    return world.finish(trial)
