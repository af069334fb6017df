"""One process of a machine reads the images for all of them; a stop of any of them ends that, and what was read is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import HEAD, made_recipe
from PIL import Image

from benchmarks import world
from benchmarks.world import Trial
from tltrain.data.scans import record


def _trial(root: Path, folder: Path) -> Trial:
    for k, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for i in range(24):
            pixels = np.random.default_rng(100 * k + i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    recipe = made_recipe(data={"source": f"folder:{root}"}, stages=[HEAD | {"steps": 2}])
    return Trial(recipe.model_dump(mode="json"), str(folder / "run"), 2, before="count_reads", arguments=(str(folder),))


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def test_one_process_reads_the_images_and_the_other_takes_its_answer(tmp_path: Path) -> None:
    world.finish(_trial(tmp_path / "d", tmp_path))
    assert len(_lines(tmp_path / "read.0")) == 48
    assert (tmp_path / "opened.0").exists()
    assert not (tmp_path / "opened.1").exists(), "it neither lists nor looks up a file"
    assert list((tmp_path / "cache").glob(".answer*")) == []


def test_a_stop_of_one_process_ends_the_scan_of_another_and_what_was_read_is_kept(tmp_path: Path) -> None:
    trial = _trial(tmp_path / "d", tmp_path)
    assert world.run(replace(trial, arguments=(str(tmp_path), "b"))) == [75, 75], world.log(trial)
    assert world.outcome(Path(trial.folder))["outcome"] == "stopped"
    kept = record.load(next((tmp_path / "cache" / "scans").glob("*.scan")))
    assert kept is not None
    assert 4 <= len(kept.paths) <= 24
    (tmp_path / "read.0").unlink()
    world.finish(trial)
    assert sorted(_lines(tmp_path / "read.0")) == sorted({str(path) for path in (tmp_path / "d").rglob("*.png")} - set(kept.paths))
