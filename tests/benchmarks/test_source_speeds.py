"""The figures of the sources are of the same images on both sides, and no time is told where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import sources
from benchmarks.source_formats import BATCH, FORMATS, pictures


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # their archives stay open while a process lives
@pytest.mark.parametrize("name", FORMATS)
def test_both_sides_give_the_same_pixels_and_labels(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := FORMATS[name].missing():
        pytest.skip(f"needs {missing}")
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    FORMATS[name].write(tmp_path, pictures(BATCH))
    ours, theirs = (sources.summed(sources.opened(side, name, tmp_path)()) for side in sources.SIDES)
    assert ours == theirs
    assert ours[0] == BATCH
    assert sources.summed(sources.opened("ours", name, tmp_path)()) == ours, "another epoch is of the same images"


def test_a_line_has_medians_of_rounds_and_what_was_taken_beyond_imports() -> None:
    ours = {"epoch": [1.0, 3.0, 2.0, 2.0], "first": [4.0, 6.0], "later": [0.5, 0.5], "mb": 150.0, "before_mb": 50.0}
    theirs = {"epoch": [1.0, 1.0, 1.0, 1.0], "first": [0.25, 0.25], "mb": 80.0, "before_mb": 50.0}
    assert sources.line({"source": "zip", "num": 100, "ours": ours, "theirs": theirs}) == (
        "| `zip` | 50 (50 to 50) | Python's zipfile, Pillow | 100 (100 to 100) | 2.00 (2.00 to 2.00) | 5.00 | 0.50 | 0.25 | 100 | 30 |"
    )


@pytest.mark.slow
def test_the_command_measures_a_source_in_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = sources.main(["--smoke", "--only", "zip"])
    assert row["num"] == 2 * BATCH
    assert (len(row["ours"]["epoch"]), len(row["ours"]["later"]), len(row["theirs"]["epoch"])) == (2, 1, 2)
    assert "| `zip` |" in capsys.readouterr().out
