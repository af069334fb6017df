"""benchmarks.doctor: what is planted is what it says, and the counts are those of the doctor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from photo_files import scene
from PIL import Image

from benchmarks import doctor


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four classes of 16 pictures."""
    for i in range(64):
        (folder := tmp_path / "pictures" / "abcd"[i % 4]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(90, 70, seed=i)).save(folder / f"{i:02d}.png")
    return tmp_path / "pictures"


def test_planted_files_are_there_and_the_others_are_as_they_were(pictures: Path, tmp_path: Path) -> None:
    planted = doctor.plant(pictures, tmp_path / "planted", seed=1)
    before = {path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png")}
    after = {path.relative_to(tmp_path / "planted").as_posix() for path in (tmp_path / "planted").rglob("*.png")}
    assert after - before == {*planted.copies, *planted.wrong, *planted.outliers}
    assert before - after == {planted.origin[name] for name in planted.wrong}
    assert [len(each) for each in (planted.copies, planted.wrong, planted.outliers)] == [30, 20, 10]
    assert all(name.split("/")[0] != label == planted.origin[name].split("/")[0] for name, label in planted.wrong.items())
    name, (source, kind) = next((name, made) for name, made in planted.copies.items() if made[1] == "mirrored")
    assert kind == "mirrored"
    mirrored = np.asarray(Image.open(tmp_path / "planted" / name))
    assert np.array_equal(mirrored[:, ::-1], np.asarray(Image.open(pictures / source)))


def test_the_table_counts_what_the_doctor_finds(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = doctor.main([str(pictures), "--backbone", "resnet-tiny", "--weights", "none", "--seeds", "1"])
    found = sum(counts[f"{kind.__name__} found"] for kind in doctor.KINDS)
    assert found >= 24
    assert counts["copies false"] == 0
    assert f"| near-duplicates, all | 30 | {found} | 0 |" in capsys.readouterr().out
