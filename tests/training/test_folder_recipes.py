"""The recipes for folders of photos that need timm: from plan to test, with random weights of the same network at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from digit_files import digit_image

from tltrain.cli.main import main
from tltrain.core import recipe as recipes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("folder-convnext", 64), ("folder-dinov2", 56)])
def test_a_recipe_trains_in_small(name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        folder = tmp_path / "photos" / ("ant" if number % 2 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        digit_image(number).save(folder / f"{number}.png")
    small = ["--data.size", str(size), "--data.resize", str(size), "--backbone.weights", "none", "--smoke", "--folder", "run"]
    assert main(["train", name, *small]) == 0
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["outcome"] == "finished"
    stages = [stage.name for stage in recipes.load(name).stages]
    assert [path.name.partition("-")[2] for path in sorted((tmp_path / "run" / "stages").iterdir())] == stages
