"""What goes wrong outside: each ends with its clear message, keeps all that was written, and the same command goes on to the same end."""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import slow

from benchmarks import trials, world
from benchmarks.trials import HEAD, References
from benchmarks.world import Trial

DISK_MB = 40
START = {"save_steps": 1, "timeout_minutes": 2.0}  # a busy machine takes its time to start, and that is no failure


def spoilt(trial: Trial, fault: str, *arguments: Any) -> tuple[list[int], dict[str, Any]]:
    """Run a trial with a fault in it. Returns its exit codes and its outcome."""
    codes = world.run(replace(trial, before=f"faults.{fault}", arguments=arguments))
    assert trials.unreadable(Path(trial.folder)) == []
    return codes, world.outcome(Path(trial.folder))


def assert_goes_on(trial: Trial, undisturbed: Path) -> None:
    """The same command again ends where the undisturbed run ended."""
    assert trials.position(Path(trial.folder)) > (-1, 0, False), "something was saved before"
    assert trials.differences(world.finish(trial), undisturbed) == []


def test_a_loss_that_is_not_a_number_on_one_rank(references: References, tmp_path: Path) -> None:
    trial = Trial(trials.recipe(), str(tmp_path / "run"), 2, start=START)
    codes, outcome = spoilt(trial, "nan_on", 6, 1)
    assert codes == [1, 1], world.log(trial)
    assert (outcome["outcome"], outcome["rank"], outcome["stage"], outcome["step"]) == ("failed", 1, "mid", 1)
    assert "loss of rank 1 became nan in stage mid, step 1, at learning rate" in outcome["error"]
    assert_goes_on(trial, references(2))


@pytest.mark.parametrize("rank", [0, slow(1)])
def test_a_rank_that_dies_is_named_by_the_other(rank: int, references: References, tmp_path: Path) -> None:
    trial = Trial(trials.recipe(), str(tmp_path / "run"), 2, start=START)
    codes, outcome = spoilt(trial, "end_process", 6, rank, "SIGKILL")
    assert codes[rank] == -9
    assert codes[1 - rank] == 1, world.log(trial)
    assert (outcome["outcome"], outcome["rank"], outcome["stage"], outcome["step"], outcome["call"]) == ("failed", rank, "mid", 1, "train")
    assert f"rank {rank} is gone" in outcome["error"]
    assert_goes_on(trial, references(2))


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_a_rank_that_hangs_takes_the_others_down_within_the_time_out(rank: int, references: References, tmp_path: Path) -> None:
    trial = Trial(trials.recipe(), str(tmp_path / "run"), 2, start=START | {"timeout_minutes": 0.15})
    processes = world.begin(replace(trial, before="faults.end_process", arguments=(6, rank, "SIGSTOP")))
    while (outcome := _outcome(trial)) is None:
        assert processes[1 - rank].exitcode is None, world.log(trial)
        time.sleep(0.1)
    processes[1 - rank].join(20)
    assert processes[1 - rank].exitcode == 1, world.log(trial)
    processes[rank].kill()
    world.join(trial, processes)
    assert (outcome["outcome"], outcome["rank"], outcome["stage"], outcome["step"], outcome["call"]) == ("failed", rank, "mid", 1, "train")
    assert f"rank {rank}" in outcome["error"]
    assert trials.unreadable(Path(trial.folder)) == []
    assert_goes_on(trial, references(2))


def _outcome(trial: Trial) -> dict[str, Any] | None:
    folder = Path(trial.folder)
    return world.outcome(folder) if (folder / "outcome.json").exists() else None


@pytest.mark.parametrize("num", [1, slow(2)])
def test_a_data_worker_that_dies(num: int, tmp_path: Path) -> None:
    spec, start = trials.recipe(stages=[HEAD | {"steps": 14}]), START | {"workers": 2, "timeout_minutes": 1.0}  # workers import torch
    whole = world.finish(Trial(spec, str(tmp_path / "whole"), num, start=start | {"workers": 0}))
    trial = Trial(spec, str(tmp_path / "run"), num, start=start)
    codes, outcome = spoilt(trial, "kill_worker", 2, num - 1)
    assert codes == [1] * num, world.log(trial)
    assert (outcome["outcome"], outcome["rank"], outcome["stage"], outcome["call"]) == ("failed", num - 1, "head", "train")
    assert "was killed by SIGKILL" in outcome["error"]
    assert "no memory left" in outcome["error"]
    assert_goes_on(trial, whole)


def on_disk(disk: Path, num: int) -> Trial:
    """A trial whose run folder is on a small disk, and whose output is not."""
    return Trial(trials.recipe(), str(disk.parent / "run"), num, start=START | {"folder": disk / "run"})


def assert_goes_on_there(trial: Trial, run: Path, undisturbed: Path) -> None:
    assert trials.unreadable(run) == []
    assert trials.position(run) > (-1, 0, False), "something was saved before"
    world.finish(trial)
    assert trials.differences(run, undisturbed) == []


@pytest.mark.parametrize(("num", "num_left"), [(1, 0), (1, 300_000), slow(2, 300_000)])
def test_a_full_disk(num: int, num_left: int, references: References, disk: Path) -> None:
    trial, run = on_disk(disk, num), disk / "run"
    codes = world.run(replace(trial, before="faults.fill_disk", arguments=(6, str(disk), num_left)))
    said = world.log(trial)
    (disk / "ballast").unlink()
    assert codes[0] == 2, said
    assert "No space left on device" in said
    assert "Make room, and start again" in said
    if num_left:  # enough for a few words, and not for a checkpoint
        outcome = world.outcome(run)
        assert (outcome["outcome"], outcome["rank"], outcome["stage"]) == ("failed", 0, "mid")
        assert "older checkpoints are untouched" in outcome["error"]
    assert_goes_on_there(trial, run, references(num))


@pytest.mark.parametrize("num", [1, slow(2)])
def test_metrics_that_cannot_be_written(num: int, references: References, tmp_path: Path) -> None:
    """Closing the file fails as well, and must not stand in the place of the error that a person can act on."""
    trial = Trial(trials.recipe(), str(tmp_path / "run"), num, start=START)
    codes, outcome = spoilt(trial, "full_metrics", 12)
    said = world.log(trial)
    assert codes[0] == 2, said
    assert "No space left on device" in outcome["error"]
    assert "Make room, and start again" in outcome["error"]
    assert (outcome["outcome"], outcome["rank"], outcome["stage"]) == ("failed", 0, "mid")
    assert "metrics-000001.jsonl may not be on the disk" in said
    assert_goes_on(trial, references(num))


@pytest.mark.parametrize("num", [1, slow(2)])
def test_a_checkpoint_folder_that_becomes_read_only(num: int, references: References, disk: Path) -> None:
    trial, run = on_disk(disk, num), disk / "run"
    codes = world.run(replace(trial, before="faults.make_read_only", arguments=(6, f"{run}/checkpoints")))
    subprocess.run(["umount", f"{run}/checkpoints"], check=True)
    assert codes[0] == 2, world.log(trial)
    outcome = world.outcome(run)
    assert (outcome["outcome"], outcome["rank"], outcome["stage"]) == ("failed", 0, "mid")
    assert "Read-only file system" in outcome["error"]
    assert "older checkpoints are untouched" in outcome["error"]
    assert_goes_on_there(trial, run, references(num))


@pytest.mark.parametrize("num", [slow(1), 2])
def test_a_run_folder_that_is_read_only_is_refused_at_once(num: int, references: References, disk: Path) -> None:
    trial, run = on_disk(disk, num), disk / "run"
    assert world.run(replace(trial, before="signal_after", arguments=(5,))) == [75] * num
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    codes = world.run(trial)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert codes == [2] * num, world.log(trial)
    assert f"the run folder {run} cannot be written" in world.log(trial)
    assert "Read-only file system" in world.log(trial)
    assert_goes_on_there(trial, run, references(num))


@pytest.mark.parametrize(
    ("how", "why", "num"),
    [
        ("full", "No space left on device", 1),
        slow("full", "No space left on device", 2),
        slow("read-only", "Read-only file system", 1),
        ("read-only", "Read-only file system", 2),
    ],
)
def test_a_disk_that_is_spoilt_while_a_start_writes_down_who_it_is(
    how: str, why: str, num: int, references: References, disk: Path
) -> None:
    trial, run = on_disk(disk, num), disk / "run"
    codes = world.run(replace(trial, before="faults.spoil_before", arguments=("runs.run_dir", "write_environment", str(disk), how)))
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    (disk / "ballast").unlink(missing_ok=True)
    assert codes == [2] * num, world.log(trial)
    assert f"the run folder {run} cannot be written" in world.log(trial)
    assert why in world.log(trial)
    world.finish(trial)
    assert trials.differences(run, references(num)) == []


@pytest.mark.parametrize(("num", "rank"), [slow(1, 0), (2, 1)])
def test_a_signal_in_a_long_evaluation_is_not_kept_waiting(num: int, rank: int, tmp_path: Path) -> None:
    """All processes leave the evaluation at the same batch; the next start evaluates the same weights from the first image on."""
    spec, start = trials.recipe(stages=[HEAD]), START | {"max_device_batch": 1}
    whole = world.finish(Trial(spec, str(tmp_path / "whole"), num, start=start))
    trial, num_batches = Trial(spec, str(tmp_path / "run"), num, start=start), 20 // num
    number = num_batches + 3  # in the second evaluation, after two steps
    codes = world.run(replace(trial, before="faults.signal_in_evaluation", arguments=(number, rank, str(tmp_path))))
    assert codes == [75] * num, world.log(trial)
    evaluated = [(tmp_path / f"batches.rank{r}").stat().st_size for r in range(num)]
    assert len(set(evaluated)) == 1, f"left at different batches: {evaluated}"
    assert number <= evaluated[0] <= number + 2 < 2 * num_batches
    assert trials.position(tmp_path / "run") == (0, 2, False)
    assert_goes_on(trial, whole)


@pytest.mark.slow
def test_an_evaluation_may_take_longer_than_the_time_out(tmp_path: Path) -> None:
    """Each of its batches is a sign of life: val after training, the calibration, the test."""
    spec = trials.recipe(stages=[HEAD | {"eval_epochs": 10}])
    slow = [first + i for first in (11, 21, 31) for i in range(4)]  # 10 batches of each evaluation
    trial = Trial(spec, str(tmp_path / "run"), 2, start={"max_device_batch": 1, "timeout_minutes": 0.15})
    world.finish(replace(trial, before="faults.slow_evaluation", arguments=(slow, 3.0)))
