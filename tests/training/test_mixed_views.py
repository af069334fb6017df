"""Finite mixed views are stored as any: a run from the stores is the run that computes them, and an older run goes on as it began."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import same, trials, world
from benchmarks.trials import HEAD, LAST
from benchmarks.world import Trial
from tltrain.cache import disk_store, feature_table
from tltrain.cache.frozen import FrozenModel
from tltrain.cli.main import main
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import validate
from tltrain.core.stage_plan import StagePlan
from tltrain.runs.run_dir import kept
from tltrain.training.run import train

MIXED = {"views": 3, "augment": "strong", "mixup": 0.4, "cutmix": 1.0, "steps": 18}  # 3.6 epochs of 60 images: views come again


@pytest.fixture(autouse=True)
def _own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_table, "SHARD_ROWS", same.SHARD_ROWS)


def run(spec: dict[str, Any], folder: Path, **start: Any) -> Path:
    assert train(validate(spec, "test"), RunFlags(folder=folder, workers=0, **start))["outcome"] == "finished"
    return folder


def losses_of(folder: Path) -> tuple[float, ...]:
    return tuple(row["loss"] for row in trials.rows_of(folder) if row["kind"] == "train")


def stores(kind: str) -> list[disk_store.StoreInfo]:
    return [store for store in disk_store.stores(disk_store_root()) if store.kind == kind]


def disk_store_root() -> Path:
    return Path(os.environ["TLTRAIN_CACHE"]) / "store"


def matched(teacher: Path, **changes: Any) -> dict[str, Any]:
    """Function matching: the student learns the teacher's answers to mixed views, and no label."""
    distill = {"teacher": {"weights": str(teacher)}, "temperature": 2.0, "weight": 1.0}
    return trials.recipe(backbone=trials.NETS["vit-tiny"], distill=distill, stages=[LAST | MIXED | changes])


def test_features_of_mixed_views_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = trials.recipe(stages=[HEAD | MIXED, HEAD | {"name": "deeper", "unfreeze": "layer4", "views": 1, "mixup": 0.3}])
    online = run(spec, tmp_path / "online", cache="never", max_device_batch=5)
    assert trials.differences(run(spec, tmp_path / "stored", cache="always", max_device_batch=5), online) == []
    plan = (tmp_path / "stored" / "plan.txt").read_text()
    assert "3 views of 60 images" in plan
    assert "a mixed view (stage head, deeper) is made of two images, which are both decoded" in plan
    assert "in stage head each image keeps the partner and share of each of its 3 mixed views, and may never be seen unmixed" in plan
    assert "in stage deeper each image has one mixed view, whose partner and share it keeps, and may never be seen unmixed" in plan
    assert len(stores("features")) == 4, "two of train, two of val, which is not mixed"
    assert main(["cache", "verify"]) == 0
    assert capsys.readouterr().out.count("equal bit for bit") == 4


def test_a_student_of_stored_answers_to_mixed_views_asks_no_teacher(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many epochs it trains, and whatever its seed and labels."""
    online = run(matched(finished_run), tmp_path / "online", cache="never")
    assert trials.differences(run(matched(finished_run), tmp_path / "stored", cache="always"), online) == []
    monkeypatch.setattr(FrozenModel, "__call__", None)
    run(matched(finished_run, steps=31) | {"seed": 3}, tmp_path / "second", cache="always")


def test_each_way_to_mix_has_a_store_and_a_loss_of_its_own(tmp_path: Path) -> None:
    losses = [
        losses_of(run(trials.recipe(stages=[HEAD | MIXED | changes]), tmp_path / name, cache="always"))
        for name, changes in (("a", {}), ("b", {"cutmix": 0.0}), ("c", {"mixup": 0.0}), ("d", {"mixup": 0.0, "cutmix": 0.0}))
    ]
    assert len(set(losses)) == 4
    assert len(stores("features")) == 4 + 1, "each has its store of train, and all share that of val"


def test_folds_do_not_share_mixed_views(tmp_path: Path) -> None:
    """A partner is of the fold's own training images: no other may be seen."""
    data = {"source": "digits", "size": 32, "resize": 32, "flip": False, "eval_limit": 20, "folds": 9}
    for fold in range(2):
        spec = trials.recipe(stages=[HEAD | MIXED | {"steps": 3}], data=data | {"fold": fold}, batch=256)
        online = run(spec, tmp_path / f"online-{fold}", cache="never")
        assert trials.differences(run(spec, tmp_path / f"stored-{fold}", cache="always"), online) == []
    assert sorted(store.made_by["split"] for store in stores("features")) == ["train", "train", "val", "val"]
    assert main(["cache", "verify"]) == 0


@pytest.mark.slow
def test_two_processes_that_are_killed_in_the_fill_change_nothing(finished_run: Path, tmp_path: Path) -> None:
    trial = Trial(matched(finished_run, steps=8), str(tmp_path / "run" / "run"), 2)
    undisturbed = world.finish(same.online(replace(trial, folder=str(tmp_path / "online" / "run"))))
    struck, problems = same.killed_fill(trial, tmp_path / "stores", undisturbed, [(2, 0), (6, 0)])
    assert (struck, problems) == (2, [])


def older(path: Path) -> None:
    """The run as a tltrain without finite mixed views left it."""
    environment = json.loads((path / "env.json").read_text())
    del environment["kept"]["mixes_by_view"]
    (path / "env.json").write_text(json.dumps(environment))
    (path / "manifest.json").unlink()


def test_an_older_run_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Finite views were mixed anew in each step: it stopped before that stage, then in it."""
    spec = validate(trials.recipe(stages=[HEAD, LAST | MIXED]), "test")

    def start(folder: Path, at: tuple[str, int] | None = None) -> str:
        def signalled(*place: Any) -> None:
            if place == at:
                os.kill(os.getpid(), signal.SIGTERM)

        return str(train(spec, RunFlags(folder=folder, workers=0), signalled)["outcome"])

    with monkeypatch.context() as before:
        before.setattr(StagePlan, "mixes_by_view", False)
        assert start(tmp_path / "old") == "finished"
    assert start(tmp_path / "run", ("head", 2)) == "stopped"
    older(tmp_path / "run")
    assert start(tmp_path / "run", ("all", 5)) == "stopped"
    assert kept(tmp_path / "run")["mixes_by_view"] is False
    capsys.readouterr()
    assert start(tmp_path / "run") == "finished"
    assert "began with a tltrain that mixes finite views anew in each step" in capsys.readouterr().out
    assert trials.rows_of(tmp_path / "run") == trials.rows_of(tmp_path / "old")
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == (tmp_path / "old" / "weights.safetensors").read_bytes()
    assert start(tmp_path / "new") == "finished"
    assert trials.rows_of(tmp_path / "new") != trials.rows_of(tmp_path / "old")
    assert kept(tmp_path / "new")["mixes_by_view"] is True
