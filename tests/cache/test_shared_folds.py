"""Folds of one recipe share their stores: what is frozen is computed once for all of them, and nothing that is learned depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HEAD, made_recipe
from safetensors.torch import load_file

from tltrain.cache import disk_store
from tltrain.cache.disk_store import Store
from tltrain.cache.feature_table import Layout, Rows
from tltrain.cache.planner import store_root
from tltrain.cli.main import main
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Data, Recipe
from tltrain.data import open_images
from tltrain.training.run import train

VIEWS = {"name": "views", "unfreeze": "head", "steps": 6, "lr": 0.01, "views": 2, "augment": "light", "carry": "last"}


def fold(number: int, **changes: Any) -> Recipe:
    data = {"folds": 3, "fold": number, "per_class": None, "eval_limit": None, **changes.pop("data", {})}
    return made_recipe(stages=[HEAD | {"views": 1}, VIEWS], data=data, **changes)


@pytest.fixture(autouse=True)
def _own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def bytes_of(run: Path) -> tuple[bytes, bytes]:
    return (run / "weights.safetensors").read_bytes(), (run / "test_predictions.csv").read_bytes()


def test_the_second_fold_fills_nothing_and_learns_the_same(tmp_path: Path) -> None:
    written: list[dict[Path, int]] = []
    for number in range(2):
        for cache in ("never", "always"):
            start = RunFlags(folder=tmp_path / f"{cache}{number}", workers=0, cache=cache)
            assert train(fold(number, batch=256), start)["outcome"] == "finished"
        assert bytes_of(tmp_path / f"never{number}") == bytes_of(tmp_path / f"always{number}")
        stores = disk_store.stores(store_root())
        assert [store.made_by["split"] for store in stores] == ["all", "all"], "of the evaluation view, and of two views"
        assert all(store.key["data"][1:] == ["all", 1797] for store in stores)
        written.append({path: path.stat().st_mtime_ns for store in stores for path in store.path.glob("*.safetensors")})
    assert written[0] == written[1]
    a, b = (load_file(tmp_path / f"always{n}" / "weights.safetensors")["fc.weight"] for n in range(2))
    assert not torch.equal(a, b)
    assert main(["cache", "verify"]) == 0


def test_features_of_blocks_that_a_fold_trained_are_its_own_and_the_teachers_are_shared(tmp_path: Path) -> None:
    """Behind a stage that trains the whole network no fold finds another's features. A teacher stays as it is."""
    whole = {"name": "whole", "unfreeze": "all", "steps": 1, "lr": 0.01, "views": 1, "carry": "last"}
    distill = {"teacher": {"weights": "shipped:vit-tiny-printed"}, "target": "features"}
    data = {"folds": 9, "per_class": None, "eval_limit": 20}
    for number in range(2):
        recipe = made_recipe(stages=[whole, HEAD | {"views": 1}], data={**data, "fold": number}, distill=distill, batch=32)
        for cache in ("never", "always"):
            assert train(recipe, RunFlags(folder=tmp_path / f"{cache}{number}", workers=0, cache=cache))["outcome"] == "finished"
        assert bytes_of(tmp_path / f"never{number}") == bytes_of(tmp_path / f"always{number}")
    stores = sorted((store.key["kind"], store.made_by["split"]) for store in disk_store.stores(store_root()))
    assert stores == [("features", "train"), ("features", "train"), ("features", "val"), ("features", "val"), ("teacher", "all")]
    plan = (tmp_path / "always0" / "plan.txt").read_text()
    assert plan.count("to fill once for 9 folds") == 1
    assert main(["cache", "verify"]) == 0


def test_a_run_without_folds_keeps_a_store_for_each_split(tmp_path: Path) -> None:
    recipe = made_recipe(stages=[HEAD | {"views": 1}], data={"per_class": None})
    assert train(recipe, RunFlags(folder=tmp_path / "run", workers=0, cache="always"))["outcome"] == "finished"
    assert sorted(store.made_by["split"] for store in disk_store.stores(store_root())) == ["train", "val"]


def test_few_labels_are_not_worth_a_store_of_all() -> None:
    assert open_images(Data(source="digits", folds=3, fold=0, per_class=6)).shared is None
    assert open_images(Data(source="digits")).shared is None


def test_where_the_images_of_a_fold_stand_among_all() -> None:
    splits = [open_images(Data(source="digits", folds=3, fold=number, repeat=number % 2)) for number in range(3)]
    assert len({images.shared.fingerprint for images in splits if images.shared is not None}) == 1
    for images in splits:
        assert images.shared is not None
        for part in (images.train, images.val, images.test):
            assert part is not None
            places_N = images.shared.positions(part)
            assert [images.shared.split.ids[i] for i in places_N] == list(part.ids)
            assert (images.shared.split.labels[places_N] == part.labels).all()


def test_a_part_of_a_table_reads_its_own_rows(tmp_path: Path) -> None:
    layout = Layout(10, 2, 4)
    for place in ("memory", "disk"):
        store = Store(tmp_path, "features", {"place": place}, {})
        for name in layout.names():
            view, samples = layout.rows(name)
            store.write(name, {"rows": torch.tensor([[float(100 * view + i)] for i in samples])})
        rows = Rows(store, layout, place, torch.device("cpu"))
        part = rows.part(np.array([7, 2, 9]))
        assert part(torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1])).flatten().tolist() == [7, 109, 102]
        assert rows(torch.tensor([0, 2]), torch.tensor([0, 1])).flatten().tolist() == [0, 102]
        part.close()
        rows.close()


def test_base_images_are_decoded_once_for_all_folds(photos: Path, tmp_path: Path) -> None:
    data = {"source": f"folder:{photos}", "folds": 3, "per_class": None, "val_fraction": 0.2, "size": 32, "resize": 36}
    for number in range(2):
        for images in ("never", "always"):
            recipe = made_recipe(stages=[VIEWS | {"views": None}], data={**data, "fold": number})
            start = RunFlags(folder=tmp_path / f"{images}{number}", workers=0, cache="never", cache_images=images)
            assert train(recipe, start)["outcome"] == "finished"
        assert bytes_of(tmp_path / f"never{number}") == bytes_of(tmp_path / f"always{number}")
        stores = [store.made_by["split"] for store in disk_store.stores(store_root())]
        assert stores == ["all"]
    assert main(["cache", "verify"]) == 0
