"""The planted bugs still fit the source, and the command that plants them tells seen from unseen."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import mutants
from benchmarks.mutants import ROOT, Mutant, Outcome


@pytest.mark.parametrize("mutant", mutants.mutants(), ids=lambda mutant: mutant.bug)
def test_each_bug_can_be_planted_and_has_its_tests(mutant: Mutant) -> None:
    assert mutant.planted(ROOT) != (ROOT / mutant.file).read_text(encoding="utf-8")
    assert mutant.tests
    assert mutant.unknown_tests(ROOT) == []


def test_an_edit_that_no_longer_fits_is_said() -> None:
    stale = replace(mutants.mutants()[0], old="no such line")
    with pytest.raises(ValueError, match=r"stands 0 times in tltrain/training/losses/objective\.py"):
        stale.planted(ROOT)


def test_a_bug_is_seen_where_each_of_its_tests_fails() -> None:
    mutant = Mutant("b", "f", "o", "n", ("t.py::one", "t.py::two[a]"))
    assert mutants.problem(mutant, Outcome(1, ("t.py::one[x]", "t.py::two[a]"), "")) is None
    assert mutants.problem(mutant, Outcome(1, ("t.py::one[x]",), "")) == "not seen by t.py::two[a]"
    assert mutants.problem(mutant, Outcome(1, ("t.py::one_more", "t.py::two[a]"), "")) == "not seen by t.py::one"
    assert "pytest ended with 2" in str(mutants.problem(mutant, Outcome(2, (), "ImportError")))


@pytest.mark.slow
def test_the_command_plants_runs_and_mends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.mutants", "--only", "^(ten bins|mistakes not sorted)$"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": seen\n") == 2
    assert "2 bugs planted, 0 not seen" in done.stdout
