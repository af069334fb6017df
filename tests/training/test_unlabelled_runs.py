"""Runs with pictures without labels: stored and computed, stopped and resumed, on one and two processes, and what they say."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from cut_runs import computed_and_stored, stopping_at
from digit_files import digit_folder, digit_image

from benchmarks import trials, world
from benchmarks.world import Trial
from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import validate
from tltrain.training.run import train

STAGES = [
    {"name": "head", "unfreeze": "head", "steps": 7, "lr": 0.01, "views": 1, "carry": "last"},
    {"name": "all", "unfreeze": "all", "steps": 8, "lr": 0.01, "views": 2, "augment": "light", "carry": "last"},
]


@pytest.fixture(autouse=True)
def _own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`labelled`, 80 train images of ten classes, and `loose`, twelve pictures; two more of them are images of test."""
    root = tmp_path_factory.mktemp("pictures")
    digit_folder(root / "labelled", 10)
    for folder in list((root / "labelled").glob("*/digit *")):
        folder.rename(folder.with_name(folder.name.removeprefix("digit ")))  # as the teacher calls them
    (root / "loose").mkdir()
    for number in range(1000, 1012):
        digit_image(number).save(root / "loose" / f"{number}.png")
    for path in sorted((root / "labelled" / "test" / "3").glob("*.png"))[:2]:
        (root / "loose" / f"again {path.name}").write_bytes(path.read_bytes())
    return root


@pytest.fixture
def spec(pictures: Path, finished_run: Path) -> dict[str, Any]:
    distill = {"teacher": {"weights": str(finished_run)}, "unlabelled": f"folder:{pictures / 'loose'}"}
    data = {"source": f"folder:{pictures / 'labelled'}", "size": 32, "resize": 32, "flip": False}
    raw = {"name": "student", "batch": 14, "data": data, "backbone": trials.NETS["resnet-tiny"], "distill": distill, "stages": STAGES}
    return validate(raw, "test").model_dump(mode="json")


def run(spec: dict[str, Any], folder: Path, **start: Any) -> Path:
    assert train(validate(spec, "test"), RunFlags(folder=folder, workers=0, **start))["outcome"] == "finished"
    return folder


@pytest.mark.parametrize(("top_k", "short"), [(None, ""), (3, " (top 3 of 10 classes)")], ids=["all classes", "top_k"])
def test_a_run_is_the_same_stored_computed_and_resumed(
    top_k: int | None, short: str, spec: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec["distill"]["top_k"] = top_k
    recipe = validate(spec, "test")
    computed, stored = computed_and_stored(recipe, tmp_path)
    stop = stopping_at(("head", 3), ("all", 5))
    flags = RunFlags(folder=tmp_path / "resumed", workers=0, cache="always")
    assert [train(recipe, flags, on_step=stop)["outcome"] for _ in range(3)] == ["stopped", "stopped", "finished"]
    assert trials.differences(tmp_path / "resumed", computed) == []
    plan = (stored / "plan.txt").read_text()
    assert f"all: the teacher's logits{short}, 2 views of 92 images" in plan
    assert "head: features before head, train, 1 view of 92 images" in plan
    capsys.readouterr()
    assert main(["cache", "verify"]) == 0
    said = capsys.readouterr().out
    assert said.count("equal bit for bit") == 6, said  # images, features and logits of two stages, of the pool and of val
    assert "0 with something wrong" in said


@pytest.mark.slow
def test_one_and_two_processes_train_alike(spec: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = (world.finish(Trial(spec, str(tmp_path / f"of {n}"), n, float64=True, start={"workers": 0})) for n in (1, 2))
    assert trials.distance(ours, theirs) < 1e-9


def test_the_counts_are_said(spec: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "student.yaml").write_text(validate(spec, "test").to_yaml())
    assert main(["plan", str(tmp_path / "student.yaml")]) == 0
    planned = " ".join(capsys.readouterr().out.split())
    folder = run(spec, tmp_path / "run", cache="never")
    said = " ".join(capsys.readouterr().out.split())
    for text in (planned, said, " ".join((folder / "plan.txt").read_text().split())):
        assert "80 train, 30 val, 40 test, 12 unlabelled images, 10 classes" in text
    for text in (planned, said):
        assert f"12 pictures without labels from {spec['distill']['unlabelled']}; left out, as images of this data set: 2 of test" in text
    environment = json.loads((folder / "env.json").read_text())["data"]
    assert environment["unlabelled"] == 12
    assert sum(environment["by_class"]["train"]) == 80
    assert json.loads((folder / "test_metrics.json").read_text())["n"] == 40
    page = (folder / "report.html").read_text()
    assert "80 train, 30 val, 40 test, 12 unlabelled images" in page
    assert "those alone of 12 further images of" in page


def test_a_resumed_run_wants_the_same_pictures(spec: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    def stop(stage: str, step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    flags = RunFlags(folder=tmp_path / "run", workers=0, cache="never", accept_data_change=True)
    assert train(validate(spec, "test"), flags, on_step=stop)["outcome"] == "stopped"
    digit_image(1100).save(pictures / "loose" / "new.png")
    try:
        with pytest.raises(UserError, match="the pictures without labels are not those that this run began with; put them back"):
            train(validate(spec, "test"), flags)
    finally:
        (pictures / "loose" / "new.png").unlink()
    assert train(validate(spec, "test"), flags)["outcome"] == "finished"
