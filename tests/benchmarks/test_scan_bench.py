"""The figures of the scan are of the same images for every contestant."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scan


@pytest.mark.slow
def test_each_contestant_sees_all_files_and_has_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laps = scan.main(["--smoke", "--folder", str(tmp_path)])
    assert {name: [lap["num"] for lap in found] for name, found in laps.items()} == {
        "first": [240], "later": [480], "csv": [480], "imagefolder": [480], "walk": [480]
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert all(f"| {title} |" in shown for title in scan.TITLES.values())
