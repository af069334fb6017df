"""The benchmark of the recipes that fit writes: its sets are as large and as even as it says, and a recipe is told in short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import fit_recipes


def test_sets_have_as_many_pictures_and_classes_as_they_should(tmp_path: Path) -> None:
    fit_recipes.draw(tmp_path / "pool", 230)
    for num_classes in (2, 10, 100):
        fit_recipes.into_classes(tmp_path / "pool", tmp_path / str(num_classes), num_classes)
        found = [len(list(folder.glob("*.jpg"))) for folder in (tmp_path / str(num_classes)).iterdir()]
        assert (len(found), sum(found)) == (num_classes, 230)
        assert max(found) - min(found) <= 2


def test_kinds_differ_more_than_their_pictures() -> None:
    chance = np.random.default_rng(0)
    colour = np.array([[np.asarray(fit_recipes.picture(kind, chance)).mean((0, 1)) for _ in range(6)] for kind in (0, 3, 6)])
    assert colour.mean(1).std(0).max() > colour.std(1).mean()


def test_what_fit_refuses_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit_recipes.main(["--pictures", "2", "--classes", "3", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "## 2 pictures of 3 classes" in said
    assert "exit 2; it says: tltrain: class folder" in said
    assert not (tmp_path / "2-of-3" / "pictures").exists()


def test_a_recipe_in_short() -> None:
    stage = {"name": "head", "unfreeze": "head", "solve": "ridge", "carry": "last"}
    told = fit_recipes.short({"batch": 32, "data": {"source": "folder:x", "size": 160}, "stages": [stage]})
    assert told.splitlines() == ["batch 32, size 160", "unfreeze head, solve ridge -> last"]
