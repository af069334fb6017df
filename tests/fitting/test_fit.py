"""`tltrain fit` from a folder to a recipe and to a trained run, and what becomes of a stop and of mistakes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_words import mistake
from digit_files import digit_image
from PIL import Image
from sklearn.datasets import load_digits

from tltrain.cli.main import main
from tltrain.core import recipe as recipes
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Data, Recipe
from tltrain.data import open_images
from tltrain.fitting import choose, fit, timing
from tltrain.fitting.choose import Chosen, Depth
from tltrain.fitting.facts import Facts
from tltrain.fitting.fit import NO_SPLITS
from tltrain.fitting.memory import VERSION, Plan
from tltrain.fitting.race import race
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
    assert "asked to take 0.001 min on " in text, "and not how long it took"
    assert "# worked out, not trained" in text
    assert "too few to tell depths apart" in text
    assert recipe.data.val_fraction == 0, "8 images of a class to learn from"
    assert open_images(recipe.data).val is None
    assert not (tmp_path / "fit" / "run").exists()
    before = (tmp_path / "fit" / "fit.json").read_text()
    assert main(["train", *asked(photos, tmp_path / "fit", "--minutes", "0.001", "--dry-run")[1:]]) == 0
    assert "tltrain fit chooses one" in capsys.readouterr().err, "data in a recipe's place is understood"
    assert (tmp_path / "fit" / "fit.json").read_text() == before, "what was measured is kept"
    edited = text.replace("batch:", "precision: bf16\nbatch:", 1)
    (tmp_path / "fit" / "recipe.yaml").write_text(edited)
    assert "recipe.yaml is not as it was written" in mistake(asked(photos, tmp_path / "fit", "--minutes", "0.001"), capsys)
    assert (tmp_path / "fit" / "recipe.yaml").read_text() == edited, "nothing is lost"


def test_a_class_that_shows_at_the_edges_is_seen_without_the_crop(tmp_path: Path) -> None:
    generator, photos = np.random.default_rng(0), tmp_path / "photos"
    for name, edge in (("dark", 0), ("light", 255)):
        (photos / name).mkdir(parents=True)
        for i in range(15):
            pixels = generator.integers(0, 256, (168, 168, 3), dtype=np.uint8)
            pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:] = edge, edge, edge, edge
            Image.fromarray(pixels).save(photos / name / f"{i}.png")
    words = ["fit", str(photos), "--backbones", "timm:test_resnet=none", "--workers", "0", "--dry-run"]  # 160 of 168 pixels
    assert main([*words, "--folder", str(tmp_path / "fit")]) == 0
    text = (tmp_path / "fit" / "recipe.yaml").read_text()
    recipe = recipes.parse(text, "test")
    assert (recipe.data.size, recipe.data.resize) == (160, 160)
    assert "no crop at the shorter side: 100" in " ".join(text.replace("#", " ").split())


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


def test_a_folder_of_another_version_is_gone_on_with_by_that_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, folder = flat_folder(tmp_path / "photos", 4), tmp_path / "fit"
    (folder / "run").mkdir(parents=True)
    first = {"source": f"folder:{photos}", "minutes": 10, "backbones": ["resnet-tiny"], "seed": 0}
    (folder / "fit.json").write_text(json.dumps({"asked": first, "plan": {"facts": {}}}))
    assert "a fit of another version of tltrain, which is not finished" in mistake(asked(photos, folder), capsys)
    (folder / "run" / "outcome.json").write_text(json.dumps({"outcome": "finished"}))
    assert main(asked(photos, folder)) == 0
    assert "is finished, by another version" in capsys.readouterr().out
    (folder / "fit.json").write_text(json.dumps({"version": VERSION, "asked": first, "plan": {"facts": {}}}))
    assert "is damaged" in mistake(asked(photos, folder), capsys)


def test_a_network_that_has_learned_from_these_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, first = flat_folder(tmp_path / "photos", 12), tmp_path / "first"
    stage = {"name": "head", "unfreeze": "head", "solve": "ridge", "views": 1, "carry": "last"}
    raw = {"name": "first", "data": {"source": f"folder:{photos}"}, "backbone": {"name": "resnet-tiny"}, "batch": 8, "stages": [stage]}
    assert train(recipes.validate(raw, "test"), RunFlags(folder=first, workers=0))["outcome"] == "finished"
    capsys.readouterr()
    said = mistake(["fit", str(photos), "--backbones", f"resnet-tiny={first}", "--folder", str(tmp_path / "fit")], capsys)
    assert "is of a run that has learned from" in said
    assert "of these 36 images" in said
    assert not (tmp_path / "fit").exists(), "before anything is probed"


def test_cuts_are_the_same_however_long_anything_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {"name": "head", "unfreeze": "head", "solve": "ridge", "views": 1, "carry": "last"}
    raw = {"name": "x", "data": {"source": "digits"}, "backbone": {"name": "resnet-tiny"}, "batch": 8, "stages": [stage]}
    recipe, took = recipes.validate(raw, "test"), iter(range(100, 0, -1))
    monkeypatch.setattr(timing, "forward_s", lambda *_: float(next(took)))
    found = timing.network_of(recipe, open_images(recipe.data), RunFlags(workers=0))
    assert found.cuts == ("layer4.0", "layer3.0", "all")


def test_a_head_that_judged_some_of_the_images_is_raced_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heads learned from fewer images than the deeper depths, and would lose for that alone."""
    raced: list[tuple[list[str], object]] = []
    monkeypatch.setattr(fit, "race", lambda folder, recipes, by_head, *_: raced.append(([d.name for d, _ in recipes], by_head)))
    source = f"folder:{flat_folder(tmp_path / 'photos', 4)}"
    facts = Facts(source, 2, 3, 1, 0, "owl", 1, "cat", 2, 300)
    deep = [Depth("layer4.0", 200, 9.0, 1e-4, "usual", folds=1)]
    for judged in (("a", "b", "c", "d"), ("a", "b")):
        plan = Plan(facts, Chosen("resnet18", "DEFAULT", "ridge", False, "cpu", {}), (), "", judged, ("a",), ())
        fit._against_head(fit.Wanted(source, tmp_path), plan, deep, {}, RunFlags(), Console(enabled=False))
    assert raced == [(["layer4.0"], {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}), (["head", "layer4.0"], None)]


def test_a_race_on_one_fold_judges_a_third_of_the_images_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = flat_folder(tmp_path / "photos", 12)
    head = {"name": "head", "unfreeze": "head", "solve": "ridge", "views": 1, "carry": "last"}
    deep = {"name": "deep", "unfreeze": "all", "steps": 1, "lr": 1e-4, "carry": "last"}
    raw = {"name": "x", "data": {"source": f"folder:{photos}"}, "backbone": {"name": "resnet-tiny"}, "batch": 8}
    recipe = {name: recipes.validate({**raw, "stages": stages}, "test").override(NO_SPLITS) for name, stages in
              (("head", [head]), ("all", [head, deep]))}  # fmt: skip
    raced = [(Depth(name, 1, folds=1), each) for name, each in recipe.items()]
    told = [race(tmp_path / "race", raced, None, {}, RunFlags(workers=0), Console(enabled=True)) for _ in range(2)]
    assert told[0] == told[1]
    assert told[0] is not None
    assert "race on 12 images" in told[0].sentence
    assert set(told[0].accuracy) == {"head", "all"}
    assert capsys.readouterr().out.count("test    top-1") == 2, "what is finished is not trained again"


KILLED = """
import os, signal, sys
from tltrain.cli.main import main
from tltrain.fitting import choose, timing
from tltrain.many import one_by_one
choose.LEAST_STEPS, choose.LEAST_RACED, choose.EPOCHS, timing.SHARES = 4, 10, ((1_000_000, 0.5),), (0.15,)
real = one_by_one.train
def killed(stage, step):
    os.kill(os.getpid(), signal.SIGKILL)
one_by_one.train = lambda recipe, start: real(recipe, start, *([killed] if recipe.data.fold == 1 else []))
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_race_sees_no_test_image_and_goes_on_after_a_kill_and_a_stop_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choose, "LEAST_STEPS", 4)
    monkeypatch.setattr(choose, "LEAST_RACED", 10)
    monkeypatch.setattr(choose, "EPOCHS", ((1_000_000, 0.5),))
    monkeypatch.setattr(timing, "SHARES", (0.15,))
    photos, folder = flat_folder(tmp_path / "photos", 20), tmp_path / "fit"

    def stopped(recipe: Recipe, start: RunFlags) -> dict[str, object]:
        return train(recipe, start, lambda stage, step: os.kill(os.getpid(), signal.SIGTERM) if recipe.data.fold == 1 else None)

    command = [sys.executable, "-c", KILLED, *asked(photos, folder, "--minutes", "600")]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with monkeypatch.context() as patched:
        patched.setattr(one_by_one, "train", stopped)
        assert main(asked(photos, folder, "--minutes", "600")) == 75
    assert not (folder / "recipe.yaml").exists()
    kept = (folder / "fit.json").read_text()
    assert main(asked(photos, folder, "--minutes", "600")) == 0
    assert json.loads((folder / "fit.json").read_text())["plan"] == json.loads(kept)["plan"]
    assert "race on 48 images, each judged by a network that never saw it" in capsys.readouterr().out
    assert run_dir.outcome(folder / "run")["outcome"] == "finished"
    tested = ids(folder / "run" / "test_predictions.csv")
    assert len(tested) == 12
    raced_depths = {path.parent.name for path in (folder / "race").glob("*/folds.json")}
    assert "all" in raced_depths
    assert len(raced_depths) == 2
    for depth in raced_depths:
        raced = [ids(folder / "race" / depth / f"r0-f{fold}" / "test_predictions.csv") for fold in range(choose.FOLDS)]
        assert sum(map(len, raced)) == len(set.union(*raced)) == 48
        assert not set.union(*raced) & tested, "the race saw none of the images that the chosen network is tested on"
    recipe = recipes.parse((folder / "recipe.yaml").read_text(), "test")
    assert recipe.differences(run_dir.read_recipe(folder / "run")) == []
    undisturbed = tmp_path / "again" / "fit"
    undisturbed.mkdir(parents=True)
    (undisturbed / "fit.json").write_text(kept)  # what was measured: times, which differ from start to start
    assert main(asked(photos, undisturbed, "--minutes", "600")) == 0
    assert (undisturbed / "recipe.yaml").read_bytes() == (folder / "recipe.yaml").read_bytes()
    weights = [(each / "run" / "weights.safetensors").read_bytes() for each in (undisturbed, folder)]
    assert weights[0] == weights[1]


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
