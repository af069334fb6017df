"""What stands in the way of a run: it ends with a word, and the same command goes on to the same end (`python -m benchmarks.faults`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import slow

from benchmarks.cases import CASES
from benchmarks.hindrances import Place, Skipped
from benchmarks.trials import References

QUICK = ("SIGTERM, planning", "an error after the claim", "a step waits for ever")
SLOW = (
    "a step is stuck", "an old checkpoint stays", "a small /dev/shm", "a stop while waiting for a lock", "two Ctrl-C where nothing answers",
)  # fmt: skip
"""The others are slower, or stand in tests of their own."""


@pytest.mark.parametrize("name", [*QUICK, *(slow(name) for name in SLOW)])
def test_a_hindrance(name: str, references: References, tmp_path: Path) -> None:
    try:
        assert CASES[name](Place(tmp_path, references)) == []
    except Skipped as skipped:
        pytest.skip(str(skipped))
