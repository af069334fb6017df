"""Runs on each source: stopped and resumed they end with the same weights, and two processes train on the same images."""

from __future__ import annotations

import os
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ALL, made_recipe
from container_files import digit_rows, tar_file
from safetensors.torch import load_file
from source_sets import made_source

from benchmarks import world
from benchmarks.world import Trial
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.runs.metrics_log import read_rows
from tltrain.training.run import train


def _files() -> dict[str, bytes]:
    return {f"{row.split}/digit {row.label}/{i:03}.png": row.content for i, row in enumerate(digit_rows())}


def _zip(root: Path) -> str:
    with zipfile.ZipFile(root / "digits.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in _files().items():
            archive.writestr(name, content)
    return f"zip:{root / 'digits.zip'}"


def _tar(root: Path) -> str:
    return f"tar:{tar_file(root / 'digits.tar', _files().items())}"


def _webdataset(root: Path) -> str:
    for split in ("train", "val", "test"):
        rows = [row for row in digit_rows() if row.split == split]
        members = [pair for i, row in enumerate(rows) for pair in ((f"{i}.png", row.content), (f"{i}.cls", str(row.label).encode()))]
        tar_file(root / f"{split}-0.tar", members)
    return f"webdataset:{root}/*.tar"


def _parquet(root: Path) -> str:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = {"image": [row.content for row in digit_rows()], "label": [row.label for row in digit_rows()]}
    pq.write_table(pa.table(columns | {"split": [row.split for row in digit_rows()]}), root / "digits.parquet")
    return f"parquet:{root / 'digits.parquet'}"


def _hugging_face(root: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["zero", "one", "two"])})
    parts = {}
    for split in ("train", "validation", "test"):
        rows = [row for row in digit_rows() if row.split == {"validation": "val"}.get(split, split)]
        images = [{"bytes": row.content, "path": None} for row in rows]
        parts[split] = datasets.Dataset.from_dict({"image": images, "label": [row.label for row in rows]}, features=features)
    datasets.DatasetDict(parts).save_to_disk(root / "saved")
    return f"hf:{root / 'saved'}"


def _lmdb(root: Path) -> str:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(root / "digits"), map_size=2**24) as database, database.begin(write=True) as transaction:
        for name, content in _files().items():
            transaction.put(name.encode(), content)
    return f"lmdb:{root / 'digits'}"


def _folder(root: Path) -> str:
    return made_source("folder", root / "set")


def _csv(root: Path) -> str:
    return made_source("csv", root / "set")


def _recipe(source: str) -> Recipe:
    data = {"source": source, "per_class": None}
    return made_recipe(batch=8, data=data, stages=[ALL | {"steps": 6, "carry": "last", "eval_epochs": 10}])


def _trained(recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    assert train(recipe, RunFlags(folder=folder, workers=0))["outcome"] == "finished"
    return load_file(folder / "weights.safetensors")


def _losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run) if row["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("made", [_folder, _csv, _zip, _tar, _webdataset, _parquet, _hugging_face, _lmdb])
def test_a_run_that_was_stopped_ends_with_the_same_weights(tmp_path: Path, made: Callable[[Path], str]) -> None:
    recipe = _recipe(made(tmp_path))
    whole = _trained(recipe, tmp_path / "whole")

    def stop(stage: str, step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(recipe, RunFlags(folder=tmp_path / "resumed", workers=0), on_step=stop)["outcome"] == "stopped"
    resumed = _trained(recipe, tmp_path / "resumed")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_two_processes_with_a_worker_each_train_on_the_same_images(tmp_path: Path) -> None:
    recipe = _recipe(_zip(tmp_path))  # all containers have one reader
    _trained(recipe, tmp_path / "one")
    two = world.finish(Trial(recipe.model_dump(mode="json"), str(tmp_path / "two"), world=2, start={"workers": 1}))
    assert _losses(two) == pytest.approx(_losses(tmp_path / "one"), rel=1e-3)
