"""Evaluation is exact: whatever the number of samples, processes and the batch: the figures are scikit-learn's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import trials, world
from benchmarks.world import Trial


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_every_size_batch_and_world_gives_the_figures_of_scikit_learn(num: int, tmp_path: Path) -> None:
    """1 to 200 samples in batches of 1 to 16: every rank compares what was gathered with what it computes itself."""
    trial = Trial(trials.recipe(), str(tmp_path / "run"), num, before="evaluations.compare", arguments=(str(tmp_path), 200, 16))
    assert world.run(trial, timeout_s=600) == [0] * num, world.log(trial)
    for rank in range(num):
        assert json.loads((tmp_path / f"compared.rank{rank}").read_text()) == {"evaluations": 3200, "wrong": []}
