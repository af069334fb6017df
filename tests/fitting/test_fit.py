"""`tltrain fit` from a folder to a recipe and to a trained run, and what becomes of a stop and of mistakes."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from cli_words import mistake
from digit_files import digit_image
from sklearn.datasets import load_digits

from tltrain.cli.main import main
from tltrain.core import recipe as recipes
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Data, Recipe
from tltrain.data import open_images
from tltrain.fitting import choose, timing
from tltrain.fitting.fit import NO_SPLITS
from tltrain.many import one_by_one
from tltrain.runs import run_dir
from tltrain.training.depths.hidden import without_test
from tltrain.training.run import train


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def asked(photos: Path, folder: Path, *more: str) -> list[str]:
    return ["fit", str(photos), "--backbones", "resnet-tiny", "--folder", str(folder), "--workers", "0", *more]


def test_a_dry_run_ends_at_a_recipe_with_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = flat_folder(tmp_path / "photos", 12)
    assert main(asked(photos, tmp_path / "fit", "--minutes", "0.001", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "recipe" in printed
    text = (tmp_path / "fit" / "recipe.yaml").read_text()
    recipe = recipes.parse(text, "test")
    assert recipe.data.source == f"folder:{photos}"
    assert [stage.solve for stage in recipe.stages] == [recipe.stages[0].solve]
    assert "# worked out, not trained" in text
    assert "too few to tell depths apart" in text
    assert not (tmp_path / "fit" / "run").exists()
    before = (tmp_path / "fit" / "fit.json").read_text()
    assert main(["train", *asked(photos, tmp_path / "fit", "--minutes", "0.001", "--dry-run")[1:]]) == 0
    assert "tltrain fit chooses one" in capsys.readouterr().err, "data in a recipe's place is understood"
    assert (tmp_path / "fit" / "fit.json").read_text() == before, "what was measured is kept"


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no folder and no data source" in mistake(["fit", str(tmp_path / "nothing")], capsys)
    photos = flat_folder(tmp_path / "photos", 12)
    for minutes in ("0", "inf", "nan", "-1"):
        assert f"--minutes is {minutes}" in mistake(asked(photos, tmp_path / "fit", f"--minutes={minutes}"), capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert "no folder of a fit" in mistake(asked(photos, tmp_path / "full"), capsys)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "fit.json").write_text(json.dumps({"asked": {"source": "folder:others", "minutes": 10}}))
    assert "source: folder:others -> folder:" in mistake(asked(photos, kept), capsys)
    (kept / "fit.json").write_text("[1")
    assert "fit.json" in mistake(asked(photos, kept), capsys)
    assert not (kept / "run").exists()


@pytest.mark.slow
def test_a_race_sees_no_test_image_and_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choose, "LEAST_STEPS", 4)
    monkeypatch.setattr(choose, "LEAST_RACED", 10)
    monkeypatch.setattr(choose, "EPOCHS", ((1_000_000, 0.5),))
    monkeypatch.setattr(timing, "SHARES", (0.15,))
    photos, folder = flat_folder(tmp_path / "photos", 20), tmp_path / "fit"

    def stopped(recipe: Recipe, start: RunFlags) -> dict[str, object]:
        return train(recipe, start, lambda stage, step: os.kill(os.getpid(), signal.SIGTERM) if recipe.data.fold == 1 else None)

    with monkeypatch.context() as patched:
        patched.setattr(one_by_one, "train", stopped)
        assert main(asked(photos, folder, "--minutes", "600")) == 75
    assert not (folder / "recipe.yaml").exists()
    kept = (folder / "fit.json").read_text()
    assert main(asked(photos, folder, "--minutes", "600")) == 0
    assert (folder / "fit.json").read_text() == kept
    assert "race on 48 images, each judged by a network that never saw it" in capsys.readouterr().out
    assert run_dir.outcome(folder / "run")["outcome"] == "finished"
    tested = ids(folder / "run" / "test_predictions.csv")
    assert len(tested) == 12
    raced_depths = {path.parent.name for path in (folder / "race").glob("*/folds.json")}
    assert "all" in raced_depths
    assert len(raced_depths) == 2, "which block is near 15 % of the time depends on the machine"
    for depth in raced_depths:
        raced = [ids(folder / "race" / depth / f"r0-f{fold}" / "test_predictions.csv") for fold in range(choose.FOLDS)]
        assert sum(map(len, raced)) == len(set.union(*raced)) == 48
        assert not set.union(*raced) & tested, "the race saw none of the images that the chosen network is tested on"
    recipe = recipes.parse((folder / "recipe.yaml").read_text(), "test")
    assert recipe.differences(run_dir.read_recipe(folder / "run")) == []


def ids(predictions: Path) -> set[str]:
    """The images of a table of predictions."""
    with predictions.open() as file:
        return {row["id"] for row in csv.DictReader(file)}


def flat_folder(root: Path, num: int) -> Path:
    """Images of three digits in class folders, without splits."""
    for k in range(3):
        (root / f"digit {k}").mkdir(parents=True)
        for n in np.flatnonzero(load_digits().target == k)[:num]:
            digit_image(int(n)).save(root / f"digit {k}" / f"{n}.png")
    return root


def test_images_are_hidden_by_their_names_as_they_are(tmp_path: Path) -> None:
    photos = flat_folder(tmp_path / "photos", 10)
    for path in photos.rglob("*.png"):
        path.rename(path.with_name(f"=1, {path.name}"))
    photos.joinpath("digit 0").rename(photos / "=digit 0")
    (tmp_path / "fit").mkdir()
    data = {"source": f"folder:{photos}"}
    before = open_images(Data.model_validate(data))
    hidden = without_test(Data.model_validate(data), tmp_path / "fit" / "test_images.csv") | NO_SPLITS
    after = open_images(Data.model_validate(data | {key.removeprefix("data."): value for key, value in hidden.items()}))
    assert before.test is not None
    assert before.val is not None
    assert sorted(after.train.ids) == sorted([*before.train.ids, *before.val.ids])
