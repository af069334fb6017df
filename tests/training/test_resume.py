"""A run that was stopped ends where it would have ended, bit for bit; with another number of processes, with each sample once."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import slow
from world_recipe import losses, recipe
from world_trials import stop_and_go_on

from benchmarks import trials, world
from benchmarks.resume import three_stages
from benchmarks.trials import distance
from benchmarks.world import Trial
from tltrain.runs.metrics_log import read_rows

NUM_STEPS = 10  # of `three_stages`


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Any:
    made: dict[int, Path] = {}

    def get(num: int) -> Path:
        if num not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            made[num] = world.finish(Trial(three_stages(finished_run), str(folder), num, start={"max_device_batch": 4}))
        return made[num]

    return get


@pytest.mark.parametrize("num_steps", [n if n in (2, 5) else slow(n) for n in range(1, NUM_STEPS)])  # 2: the end of a stage
def test_one_process_stopped_at_every_step_boundary(num_steps: int, undisturbed: Any, finished_run: Path, tmp_path: Path) -> None:
    trial = Trial(three_stages(finished_run), str(tmp_path / "run"), start={"max_device_batch": 4})
    assert trials.differences(stop_and_go_on(trial, num_steps), undisturbed(1)) == []


def test_the_run_has_all_it_should(undisturbed: Any) -> None:
    ends = [(row["stage"], row["reason"], row["step"]) for row in read_rows(undisturbed(1)) if row["kind"] == "stage_end"]
    assert [end[:2] for end in ends] == [("early", "early"), ("mid", "finished"), ("all", "finished")]
    assert sum(end[2] for end in ends) == NUM_STEPS
    assert "3 micro-batches" in (undisturbed(1) / "plan.txt").read_text()


@pytest.mark.parametrize(
    ("num", "num_steps", "rank", "workers"),
    [(1, 4, 0, 2), slow(2, 1, 1, 0), slow(2, 4, 0, 2), slow(2, 6, 1, 0), slow(4, 5, 3, 0), (3, 3, 2, 0)],
)
def test_a_world_stopped_by_one_of_its_processes(
    num: int, num_steps: int, rank: int, workers: int, undisturbed: Any, finished_run: Path, tmp_path: Path
) -> None:
    start = {"max_device_batch": 4, "workers": workers}
    trial = Trial(three_stages(finished_run), str(tmp_path / "run"), num, start=start)
    assert trials.differences(stop_and_go_on(trial, num_steps, rank), undisturbed(num)) == []


@pytest.mark.parametrize("strategy", [slow("fsdp2"), slow("zero2"), "zero3"])
def test_a_sharded_run_goes_on_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    spec = recipe("vit-tiny")
    whole = world.finish(Trial(spec, str(tmp_path / "whole"), 2, strategy))
    run = stop_and_go_on(Trial(spec, str(tmp_path / "run"), 2, strategy), 5)
    assert trials.differences(run, whole) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [pair if pair in ((4, 1), (2, 3)) else slow(*pair) for pair in itertools.permutations(range(1, 5), 2)],
)
def test_another_number_of_processes_goes_on(before: int, after: int, tmp_path: Path, elastic_reference: Path) -> None:
    """Each sample of each epoch exactly once, every loss within 1e-9, in float64."""
    spec, ids = recipe("resnet-tiny"), tmp_path / "ids"
    ids.mkdir()
    folder = str(tmp_path / "run")
    first = Trial(spec, folder, before, float64=True, before="record_and_stop", arguments=(str(ids), 5))
    assert world.run(first) == [75] * before, world.log(first)
    world.finish(Trial(spec, folder, after, float64=True, before="record_ids", arguments=(str(ids),)))
    assert losses(Path(folder)) == pytest.approx(losses(elastic_reference), rel=1e-9)
    assert distance(Path(folder), elastic_reference) < 1e-9
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for file in ids.iterdir():
        for line in file.read_text().splitlines():
            stage, step, index = (int(v) for v in line.split())
            seen[stage].append((step, index))
    for stage_seen in seen.values():
        steps = Counter(step for step, _ in stage_seen)
        assert steps == {0: 13, 1: 13, 2: 13}
        assert max(Counter(index for _, index in stage_seen).values()) == 1  # 39 of 60 samples: less than an epoch


@pytest.fixture(scope="module")
def elastic_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.finish(Trial(recipe("resnet-tiny"), str(tmp_path_factory.mktemp("elastic") / "run"), float64=True))


@pytest.mark.parametrize(("strategy", "before", "after"), [("fsdp2", 2, 3), slow("zero2", 3, 2), slow("zero3", 2, 3)])
def test_sharded_runs_are_elastic_too(strategy: str, before: int, after: int, tmp_path: Path) -> None:
    """One checkpoint format for every world: even DeepSpeed, whose own refuses another number of processes."""
    spec, double = recipe("resnet-tiny"), strategy == "fsdp2"
    whole = world.finish(Trial(spec, str(tmp_path / "whole"), before, strategy, float64=double))
    folder = str(tmp_path / "run")
    first = Trial(spec, folder, before, strategy, float64=double, before="signal_after", arguments=(5,))
    assert world.run(first) == [75] * before, world.log(first)
    run = world.finish(Trial(spec, folder, after, strategy, float64=double))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-9 if double else 1e-3)
