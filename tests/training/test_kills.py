"""SIGKILL at random moments, and signals that ask a run to stop at the worst ones: it goes on, and ends equal."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import slow

from benchmarks import trials, world
from benchmarks.kills import START
from benchmarks.trials import Moments, References
from benchmarks.world import Trial


@pytest.mark.slow
@pytest.mark.parametrize(("num", "num_kills"), [(1, 14), (2, 6)])
def test_a_run_that_is_killed_again_and_again_ends_equal(num: int, num_kills: int, references: References, tmp_path: Path) -> None:
    """At most four kills a run, so that late moments are reached as well."""
    undisturbed, killed = references(num), 0
    moments = Moments(random.Random(f"{trials.seed()} {num}"), references.seconds[num])
    for i in range(4 * num_kills):
        trial = Trial(trials.recipe(), str(tmp_path / f"{i}" / "run"), num, start=START)
        result = trials.killed_run(trial, undisturbed, min(4, num_kills - killed), moments)
        print("\n".join(result.places))
        assert result.problems == (), f"TLTRAIN_SEED={trials.seed()}"
        killed += len(result.places)
        if killed == num_kills:
            break
    assert killed == num_kills


@pytest.mark.parametrize(
    ("module", "function", "number"),
    [
        ("core.files", "sync", 1),
        ("core.files", "sync", 2),
        ("runs.run_dir", "claim", 1),
        ("runs.run_dir", "write_environment", 1),
        ("runs.checkpoint", "_write", 2),
        ("core.files", "commit_folder", 3),
        ("core.files", "remove_folder", 2),
        ("training.run", "save_stage_weights", 2),
        ("training.stage", "_spread", 3),
        ("evaluation.results", "write_test", 1),
        ("runs.run_dir", "write_outcome", 1),
        ("evaluation.results", "report", 1),
    ],
)
def test_a_run_killed_at_the_worst_moments_ends_equal(
    module: str, function: str, number: int, references: References, tmp_path: Path
) -> None:
    trial = Trial(trials.recipe(), str(tmp_path / "run"), start=START)
    assert world.run(replace(trial, before="faults.kill_in", arguments=(module, function, number))) == [-9], world.log(trial)
    assert trials.unreadable(tmp_path / "run") == []
    assert trials.differences(world.finish(trial), references(1)) == []


@pytest.mark.parametrize(
    ("moment", "name", "num", "rank"),
    [
        ("step", "SIGTERM", 1, 0),
        ("evaluate", "SIGUSR2", 1, 0),
        ("save", "SIGINT", 1, 0),
        ("between", "SIGTERM", 1, 0),
        ("step", "SIGINT", 2, 1),
        slow("evaluate", "SIGTERM", 2, 1),
        ("save", "SIGUSR2", 2, 0),
        slow("between", "SIGUSR2", 2, 1),
    ],
)
def test_a_signal_at_any_moment_saves_and_stops(
    moment: str, name: str, num: int, rank: int, references: References, tmp_path: Path
) -> None:
    """In the first step, during an evaluation, during a save, between two stages; to one process of two alone."""
    trial = Trial(trials.recipe(), str(tmp_path / "run"), num, start=START | {"save_steps": 2})
    codes = world.run(replace(trial, before="faults.signal_at", arguments=(moment, name, rank)))
    assert codes == [75] * num, world.log(trial)
    outcome = world.outcome(tmp_path / "run")
    assert outcome["outcome"] == "stopped"
    noticed = {"step": ("head", 1), "evaluate": ("head", 3), "between": ("mid", 0)}
    if moment in noticed:  # a save runs beside the loop
        stage, step = noticed[moment]
        assert outcome["stage"] == stage
        assert 0 <= outcome["step"] - step <= 1, "it is acted on one step later"
    assert outcome["signal"] == (name if rank == 0 else "a signal to another process")
    assert trials.unreadable(tmp_path / "run") == []
    assert trials.position(tmp_path / "run")[1] == outcome["step"]
    assert trials.differences(world.finish(trial), references(num)) == []
