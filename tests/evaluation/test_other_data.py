"""A finished run and data that is not its own: what of its recipe holds there, and what counts as learned from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import open_images
from tltrain.data.splits import split_names
from tltrain.evaluation.evaluate import evaluate
from tltrain.evaluation.kept_data import images_for, learned
from tltrain.runs import data_record, run_dir


def test_another_source_is_neither_folded_nor_asked_for_columns(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = run_dir.read_recipe(finished_run)
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval_limit": None})})
    folded = whole.data.model_copy(update={"folds": 3, "fold": 1, "repeat": 2, "image_column": "picture", "label_column": "class"})
    figures = []
    for data in (whole.data, folded):
        monkeypatch.setattr(run_dir, "read_recipe", lambda run, data=data: recipe.model_copy(update={"data": data}))
        figures.append(evaluate(finished_run, "digits", "test", 256))
    assert figures[0]["n"] == 359
    assert figures[1] == figures[0]


def test_a_mistake_in_other_data_names_the_run_that_it_comes_from(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    spec = Data(source=f"folder:{tmp_path}", size=8, resize=8, depth=3)
    said = "no folder of classes at that level; its deepest are at level 1"
    with pytest.raises(UserError, match=f"{said}; data.depth comes from the run runs/tree"):
        images_for(spec, Path("runs/tree"), other=True)
    with pytest.raises(UserError, match=f"{said}$"):
        images_for(spec, Path("runs/tree"), other=False)


def test_a_name_of_weights_in_a_run_folder_is_not_that_run(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = run_dir.read_recipe(finished_run).data
    source = open_images(data).source
    assert source is not None
    monkeypatch.chdir(finished_run)
    assert learned("imagenet", data, source) == learned("timm/resnet18.a1_in1k", data, source) == set()
    assert learned(".", data, source) == learned(str(finished_run / "weights.safetensors"), data, source) != set()


@pytest.mark.parametrize(("before", "now"), [("sample", "full"), ("full", "sample"), ("sample", "sample")])
def test_images_are_known_by_their_names_where_the_hashes_are_of_other_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, now: str
) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    for i in range(20):
        (tmp_path / "d" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6, 3), np.uint8)).save(tmp_path / "d" / "ab"[i % 2] / f"{i}.png")
    data = Data.model_validate({"source": f"folder:{tmp_path / 'd'}", "check": before})
    images = open_images(data)
    assert images.source is not None
    names = split_names(images)
    run = tmp_path / "run"
    run.mkdir()
    rows = zip(images.source.ids, names, ["a"] * 20, images.source.digests, strict=True)
    data_record.write(run, data_record.DataRecord(images.classes, images.fingerprint), [data_record.Sample(*row) for row in rows])
    monkeypatch.setattr(run_dir, "read_recipe", lambda run: SimpleNamespace(data=data))
    later = data.model_copy(update={"check": now})
    source = open_images(later).source
    assert source is not None
    expected = {i for i, name in enumerate(names) if name in ("train", "val")}
    assert learned(str(run), later, source) == expected != set()
    elsewhere = later.model_copy(update={"source": "folder:elsewhere"})
    assert learned(str(run), elsewhere, source) == (expected if before == now else set())
