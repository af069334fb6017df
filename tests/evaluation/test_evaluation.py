"""Evaluation is exact, whatever the number of samples, processes and the batch: the figures are scikit-learn's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.evaluations import compare_in_world


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_every_size_batch_and_world_gives_the_figures_of_scikit_learn(num: int, tmp_path: Path) -> None:
    """1 to 200 samples in batches of 1 to 16, every fourth pair of them: every rank compares what was gathered with what it should be."""
    results = compare_in_world(tmp_path, num, every=4)
    assert results == [{"evaluations": 800, "wrong": []}] * num
