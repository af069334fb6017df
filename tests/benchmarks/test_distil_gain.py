"""What `benchmarks.distil_gain` compares: students that differ in one thing, teachers trained once, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from digit_files import digit_image
from sklearn.datasets import load_digits

from benchmarks import distil_gain, fit_gain
from benchmarks.distil_gain import Asked, arms
from benchmarks.fit_gain import Contestant, Task
from tltrain.core.recipe import validate
from tltrain.runs import run_dir

STAGE = {"name": "patient", "unfreeze": "all", "steps": 999, "lr": 1e-3, "augment": "light", "views": 16, "eval_epochs": 9.0}
DATA = {"source": "folder:x"}
DISTILL = {"teacher": {"weights": "t"}}
STUDENT = validate(
    {"name": "s", "batch": 10, "data": DATA, "backbone": {"name": "resnet-micro"}, "distill": DISTILL, "stages": [STAGE]}, "test"
)


@pytest.fixture
def asked() -> Asked:
    head = {"name": "head", "unfreeze": "head", "solve": "ridge", "views": 1, "carry": "last"}
    backbone = {"name": "resnet-tiny", "weights": "DEFAULT"}
    teacher = validate({"name": "t", "batch": 8, "data": DATA, "backbone": backbone, "stages": [head]}, "test")
    return Asked(teacher, "resnet-micro", (1, 2), 4, 2, 1)


def test_students_differ_in_one_thing(asked: Asked) -> None:
    made = {name: arm.changes(STUDENT, asked) for name, arm in arms(35).items()}
    first = made["distil"]
    assert (first.stages[0].steps, first.stages[0].views) == (7, 4), "2 epochs of 35 images, 10 at a time"

    def others(name: str) -> dict[str, str]:
        return {line.partition(": ")[0]: line.partition(": ")[2] for line in first.differences(made[name])}

    assert others("short") == {"stages.0.steps": "7 -> 4"}
    assert others("one-view") == {"stages.0.views": "4 -> 1", "stages.0.augment": "light -> none"}
    assert others("mixed") == {"stages.0.mixup": "0.0 -> 0.5"}
    assert others("seeds") == others("folds") == {}
    assert made["alone"].distill is None
    assert {key.partition(".")[0] for key in others("alone")} == {"distill"}
    assert made["alone-short"].stages == made["short"].stages


def test_teachers_are_trained_once_and_only_those_that_are_needed(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(contestant: Contestant, task: Task) -> dict[str, Any]:
        ran.append(task.folder.name)
        task.folder.mkdir(parents=True)
        return {"top1": 0.5, "seconds": 1.0, "cpu_seconds": 1.0}

    taught: dict[str, list[str]] = {}

    def draft(asked: Asked, out: Path, seed: int, teachers: str) -> None:
        file = distil_gain._draft_file(out, seed, teachers)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(STUDENT.to_yaml(), encoding="utf-8")
        taught[teachers] = [name for name in ran if name in distil_gain._teachers(asked, teachers)]

    monkeypatch.setattr(fit_gain, "run", run)
    monkeypatch.setattr(fit_gain, "split", lambda out, seed: out / f"seed-{seed}" / "images")
    monkeypatch.setattr(distil_gain, "_draft", draft)
    distil_gain.run_all(asked, tmp_path, [0], ["distil", "short"])
    assert ran == ["teacher", "distil", "short"]
    assert taught == {"one": ["teacher"]}
    del ran[:]
    distil_gain.run_all(asked, tmp_path, [0], list(arms(1)))
    assert ran == ["teacher-1", "teacher-folds", "one-view", "mixed", "seeds", "folds", "alone", "alone-short"]
    assert taught == {"one": [], "seeds": ["teacher-1"], "folds": ["teacher-folds"]}, "teachers come before what they teach"


def test_the_table_is_of_the_seeds_that_all_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil_gain, "describe", lambda *_: {})
    monkeypatch.setattr(run_dir, "read_recipe", lambda _: STUDENT)
    for name, values in {"distil": (0.8, 0.9, 0.7), "alone": (0.7, 0.8), "teacher": (0.9, 0.9, 0.9)}.items():
        for seed, top1 in enumerate(values):
            file = tmp_path / f"seed-{seed}" / f"{name}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({"top1": top1, "seconds": 300.0, "cpu_seconds": 99.6}), encoding="utf-8")
    said = distil_gain.report(tmp_path, 3)
    assert "| distil | 2 | 85.0 | 7.1 |  | 300 | 100 |" in said
    assert "| the student alone, long | 2 | 75.0 | 7.1 | +10.0 (+10.0 to +10.0) | 300 | 100 |" in said
    assert "| the teacher | 2 | 90.0 | 0.0 | -5.0 (-10.0 to +0.0) | 300 | 100 |" in said
    assert "mixup" not in said
    assert "fewer than two seeds" in distil_gain.report(tmp_path, 1)


@pytest.mark.slow
def test_a_student_runs(asked: Asked, tmp_path: Path) -> None:
    """The teacher, the recipe of the command, and the student, each in a process of its own."""
    labels = load_digits().target
    for digit in (0, 1):
        (tmp_path / "pictures" / f"digit {digit}").mkdir(parents=True)
        for number in (labels == digit).nonzero()[0][:12]:
            digit_image(int(number)).save(tmp_path / "pictures" / f"digit {digit}" / f"{number}.png")
    fit_gain.write_pictures(tmp_path / "pictures", tmp_path / "out")
    distil_gain.run_all(asked, tmp_path / "out", [0], ["distil"])
    found = json.loads((tmp_path / "out" / "seed-0" / "distil.json").read_text())
    assert 0 <= found["top1"] <= 1
    assert found["seconds"] > 0
