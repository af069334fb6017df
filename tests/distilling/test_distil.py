"""`tltrain distil` from finished runs to a student's recipe, to its run, and to the two side by side; and what becomes of mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_words import mistake
from digit_files import digit_folder
from safetensors.torch import load_file

from tltrain.cli.main import main
from tltrain.core import recipe as recipes
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Backbone, Recipe
from tltrain.data import Split
from tltrain.data.views import Views
from tltrain.distilling import against, choose, distil, teachers
from tltrain.distilling.against import _accuracy, _answers
from tltrain.distilling.choose import Pace, length
from tltrain.distilling.distil import folder_of
from tltrain.distilling.student import spec_of
from tltrain.evaluation.trained import load_trained, probabilities
from tltrain.runs.record import read_predictions
from tltrain.training.run import train


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digit_folder(tmp_path_factory.mktemp("digits") / "pictures")


@pytest.fixture(scope="module")
def runs(digits: Path) -> list[Path]:
    """Two finished runs of two seeds, tested on the same images. The second head was trained for a step, and errs."""
    return [taught(digits, digits.parent / f"teacher-{seed}", seed) for seed in (0, 1)]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "LEAST_STEPS", 6)
    monkeypatch.setattr(choose, "EPOCHS", ((10**12, 1.0),))
    monkeypatch.setattr(choose, "VIEWS", (2,))


def taught(pictures: Path, run: Path, seed: int = 0, data: dict[str, Any] | None = None) -> Path:
    """A finished run: the head of a small pretrained ResNet, solved or trained for a step."""
    solved = {"name": "head", "unfreeze": "head", "solve": "ridge", "views": 1, "carry": "last"}
    trained = {"name": "head", "unfreeze": "head", "steps": 1, "lr": 1e-3, "views": 1, "carry": "last"}
    raw = {"name": "teacher", "seed": seed, "batch": 16, "data": {"source": f"folder:{pictures}", "flip": False, **(data or {})},
           "backbone": {"name": "resnet-tiny", "weights": "DEFAULT"}, "stages": [trained if seed else solved]}  # fmt: skip
    assert train(recipes.validate(raw, "test"), RunFlags(folder=run, workers=0, cache="never"))["outcome"] == "finished"
    return run


def asked(teaching: Sequence[Path], folder: Path, *more: str, to: str = "resnet-micro") -> list[str]:
    return ["distil", *map(str, teaching), "--to", to, "--folder", str(folder), "--workers", "0", *more]


def test_from_a_run_to_its_student(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "small"
    assert main(asked(runs[1:], folder, "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "store   the teacher's answers to 2 views of 32 images are not stored (it saves less than 1 s)" in printed
    assert re.search(r"time    6 steps, about .* with the teacher's answers", printed)
    assert "the student's weights are random" in printed
    assert not (folder / "run").exists()
    text = (folder / "recipe.yaml").read_text()
    recipe = recipes.parse(text, "test")
    assert recipe.distill is not None
    assert (recipe.distill.teacher.weights, recipe.distill.ensemble) == (str(runs[1]), ())
    assert (recipe.seed, recipe.data.seed, recipe.data.flip) == (1, 0, False), "those of the teacher"
    assert (recipe.backbone.name, recipe.backbone.weights, recipe.data.size) == ("resnet-micro", None, 32)
    assert [(s.unfreeze, s.steps, s.views) for s in recipe.stages] == [("all", 6, 2)]
    for reason in ("# random: ", "# softened, ", "# each view is seen "):
        assert reason in text
    assert main(["distill", *asked(runs[1:], folder)[1:]]) == 0, "the other spelling is understood, and the recipe is kept"
    assert (folder / "recipe.yaml").read_text() == text
    printed = capsys.readouterr().out
    found = json.loads((folder / "run" / "distilled.json").read_text())
    mine, theirs = (read_predictions(path) for path in (folder / "run", runs[1]))
    assert mine is not None
    assert theirs is not None
    assert mine.samples == theirs.samples
    assert found["n"] == 16
    assert found["gain"][0] == pytest.approx(mine.right.mean() - theirs.right.mean())
    assert found["teacher_top1"][0] == pytest.approx(theirs.right.mean())
    assert found["student"]["parameters"] == sum(t.numel() for t in load_trained(folder / "run").chain.parameters())
    assert found["student"]["parameters"] < found["teacher"]["parameters"]
    assert found["teacher"]["bytes"] == (runs[1] / "weights.safetensors").stat().st_size
    page = (folder / "run" / "report.html").read_text()
    assert "Student and teacher" in page
    assert "on the same 16 test images" in page
    assert "on the same 16 test images" in printed
    again = asked(runs[1:], folder)
    (folder / "run" / "distilled.json").unlink()
    assert main(again) == 0, "a run that was killed before it was set against its teacher is, by the same command"
    assert json.loads((folder / "run" / "distilled.json").read_text())["gain"] == found["gain"]
    assert "minutes: None -> 3.0" in mistake([*again, "--minutes", "3"], capsys)
    plan = (folder / "run" / "plan.txt").read_text()
    assert "the teacher's logits, 2 views of 32 images" in plan
    assert "not stored: it saves less than 1 s" in plan, "as was said"
    (folder / "recipe.yaml").write_text(text.replace("steps: 6", "steps: 7"))
    assert "recipe.yaml is not as it was written" in mistake(again, capsys)
    assert "steps: 7" in (folder / "recipe.yaml").read_text(), "nothing is lost"


def test_several_runs_teach_by_the_mean_of_their_probabilities(runs: list[Path], tmp_path: Path) -> None:
    taken = teachers.opened(runs)
    folder = tmp_path / "small"
    assert main(asked(runs, folder, "--dry-run")) == 0
    recipe = recipes.load(str(folder / "recipe.yaml"))
    assert recipe.distill is not None
    assert [each.weights for each in recipe.distill.teachers] == [str(run) for run in runs]
    assert "# more teachers: the student learns the mean of 2 softened answers" in (folder / "recipe.yaml").read_text()
    test = taken.images.test
    assert test is not None
    p_NK = np.mean([_probabilities(run, test) for run in runs], axis=0)
    want = dict(zip(test.ids, (p_NK.argmax(1) == test.labels).astype(float).tolist(), strict=True))
    assert _answers(taken.teachers, test) == want
    alone = read_predictions(runs[1])
    assert alone is not None
    assert want != alone.right_by_id, "else nothing was averaged"
    shutil.copytree(runs[0], tmp_path / "digits-fit" / "run")
    assert teachers.opened([tmp_path / "digits-fit"]).teachers[0].path == tmp_path / "digits-fit" / "run", "the folder of a fit is its run"


def _probabilities(run: Path, split: Split) -> np.ndarray:
    trained = load_trained(run)
    views = Views(split, trained.preprocess, "none", False, 0)
    p_NK: np.ndarray = probabilities(trained, torch.stack([views.view(i, 0) for i in range(len(split))])).numpy()
    return p_NK


def test_mistakes(runs: list[Path], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "small"
    for minutes in ("0", "inf", "nan", "-1"):
        assert f"--minutes is {minutes}" in mistake(asked(runs[:1], folder, f"--minutes={minutes}"), capsys)
    assert "give the folder that `tltrain train` made" in mistake(asked([tmp_path / "nothing"], folder), capsys)
    assert "given twice" in mistake(asked([runs[0], runs[0]], folder), capsys)
    assert "backbone.name is 'resnet-mcro'; did you mean" in mistake(asked(runs[:1], folder, to="resnet-mcro"), capsys)
    stopped = tmp_path / "stopped"
    shutil.copytree(runs[0], stopped)
    (stopped / "outcome.json").write_text(json.dumps({"outcome": "stopped"}))
    assert "is no finished run (it has stopped)" in mistake(asked([stopped], folder), capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert "no folder of a distillation" in mistake(asked(runs[:1], tmp_path / "full"), capsys)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "distil.json").write_text("[1")
    assert "distil.json" in mistake(asked(runs[:1], tmp_path / "damaged"), capsys)
    assert not folder.exists()


def test_teachers_of_other_splits_classes_and_data_are_refused(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, folder = tmp_path / "flat", tmp_path / "small"
    for split in ("train", "val", "test"):
        shutil.copytree(digits / split, flat, dirs_exist_ok=True)
    one = taught(flat, tmp_path / "one")
    other = taught(flat, tmp_path / "other", data={"seed": 1})
    assert re.search(r"other has learned from \d+ of the 12 test images", mistake(asked([one, other], folder), capsys))
    three = tmp_path / "three"
    shutil.copytree(flat, three)
    shutil.rmtree(three / "digit 3")
    few = taught(three, tmp_path / "few")
    assert "teachers must know the same" in mistake(asked([one, few], folder), capsys)
    (flat / "digit 0" / "new.png").write_bytes(next((digits / "test" / "digit 1").iterdir()).read_bytes())
    said = mistake(asked([one], folder), capsys)
    assert "of the same split" in said
    assert "data that has not changed" in said
    shutil.rmtree(flat)
    assert "the data of" in mistake(asked([one], folder), capsys)
    assert not folder.exists()


def test_a_student_that_is_larger_than_its_teacher_is_said(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(asked(runs[:1], tmp_path / "large", "--dry-run", to="resnet-small")) == 0
    assert "it is not the smaller network" in capsys.readouterr().out


def test_a_student_has_the_weights_that_are_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without its library is found, and what would have to be fetched is left random, and said."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    spec, why = spec_of("mobilenet_v3_small")
    assert (spec.name, spec.weights) == ("torchvision:mobilenet_v3_small", None)
    assert "its own are not on this machine; --to mobilenet_v3_small=DEFAULT fetches them" in why
    assert spec_of("mobilenet_v3_small=DEFAULT")[0] == Backbone(name="torchvision:mobilenet_v3_small", weights="DEFAULT")
    spec, why = spec_of("resnet-tiny")
    assert (spec.name, spec.weights) == ("resnet-tiny", "DEFAULT")
    assert spec_of("resnet-micro") == (Backbone(name="resnet-micro"), "random: resnet-micro has no weights that come with it")


def test_the_folder_is_named_for_both() -> None:
    assert folder_of([Path("runs/photos-fit/run")], "timm:lite0=x/y.pth") == Path("runs/photos-fit-to-timm-lite0")
    assert folder_of([Path("runs/a"), Path("runs/b")], "nets/small.pth") == Path("runs/a-to-small")


def test_folds_teach_where_the_source_keeps_test_images_out_of_them(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    for split in ("train", "val", "test"):
        shutil.copytree(digits / split, flat, dirs_exist_ok=True)
    for name, pictures in (("apart", digits), ("mixed", flat)):
        for fold in range(2):
            taught(pictures, tmp_path / name / f"r0-f{fold}", data={"folds": 2, "fold": fold})
        (tmp_path / name / "folds.json").write_text(json.dumps({"k": 2, "repeats": 1}))
    assert main(asked([tmp_path / "apart"], tmp_path / "small", "--dry-run")) == 0
    recipe = recipes.load(str(tmp_path / "small" / "recipe.yaml"))
    assert recipe.distill is not None
    assert [Path(str(each.weights)).name for each in recipe.distill.teachers] == ["r0-f0", "r0-f1"]
    assert recipe.data.folds is None, "the student learns from all training images"
    said = mistake(asked([tmp_path / "mixed"], tmp_path / "none"), capsys)
    assert "every image was learned from by all folds but one" in said
    assert "give it alone" in mistake(asked([tmp_path / "apart", tmp_path / "mixed"], tmp_path / "none"), capsys)
    assert not (tmp_path / "none").exists()


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Pace:
    monkeypatch.setattr(choose, "VIEWS", (64, 32, 16, 8, 4, 2))
    monkeypatch.setattr(choose, "EPOCHS", ((2_000, 300.0), (10**12, 50.0)))
    return Pace(answer_s=0.01, answer_bytes=20, step_s=0.1, rest_s=10.0, room_bytes=10**9)


@pytest.mark.parametrize(
    ("left_s", "views", "steps"),
    [
        (None, 64, 3_000),  # 300 passes of 10 steps
        (1_000.0, 64, 7_980),  # 192 s of answers fit into a quarter
        (500.0, 32, 3_940),  # 64 views would take 192 of 490 s
        (60.0, 4, 380),
        (11.0, 2, 10),  # one pass, whatever the time
    ],
)
def test_views_and_steps_fit_into_the_time(pace: Pace, left_s: float | None, views: int, steps: int) -> None:
    chosen = length(pace, num_train=300, batch=30, left_s=left_s)
    assert (chosen.views, chosen.steps) == (views, steps)
    assert chosen.total_s == pytest.approx(views * 300 * 0.01 + steps * 0.1 + 10)
    assert left_s is None or steps == 10 or chosen.total_s <= left_s
    assert ("even one pass takes" in chosen.why) == (left_s == 11.0)


def test_a_recipe_says_whether_answers_are_stored(pace: Pace) -> None:
    stored = length(pace, num_train=300, batch=30, left_s=500.0)
    assert "to make, once" in stored.lines(300)[0]
    assert "the stored answers cost nothing more" in stored.why
    anew = choose.answered_anew(stored, pace, 300, 30, 500.0, "--cache never")
    assert anew.steps == 1_225, "each takes 0.1 s, and 0.3 s for 30 answers"
    assert anew.total_s == pytest.approx(500.0)
    assert "are not stored (--cache never)" in anew.lines(300)[0]
    assert "stored" not in anew.why


def test_views_fit_onto_the_disk_and_are_all_seen(pace: Pace) -> None:
    small = Pace(**{**vars(pace), "room_bytes": 300 * 20 * 20})
    assert length(small, 300, 30, None).views == 16
    dear = Pace(**{**vars(pace), "answer_s": 0.0, "step_s": 10.0})
    assert length(dear, 300, 30, 1_010.0).views == 8, "of 10 passes none sees 16 views"


@pytest.mark.slow
def test_a_stop_changes_nothing(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(recipe: Recipe, start: RunFlags) -> dict[str, Any]:
        return train(recipe, start, lambda _, step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)

    with monkeypatch.context() as patched:
        patched.setattr(distil, "train", stopped)
        assert main(asked(runs, tmp_path / "stopped")) == 75
    assert main(asked(runs, tmp_path / "stopped")) == 0
    assert main(asked(runs, tmp_path / "whole")) == 0
    states = [load_file(tmp_path / name / "run" / "weights.safetensors") for name in ("stopped", "whole")]
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
    figures = [json.loads((tmp_path / name / "run" / "distilled.json").read_text())["gain"] for name in ("stopped", "whole")]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("trained", [False, True], ids=["chosen", "trained"])
def test_a_teacher_that_was_trained_anew_is_another(
    trained: bool, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its test images may be among those that the kept recipe trains on, and its figures are not those of the student's teacher."""
    flat, teacher, folder = tmp_path / "flat", tmp_path / "teacher", tmp_path / "small"
    for split in ("train", "val", "test"):
        shutil.copytree(digits / split, flat, dirs_exist_ok=True)
    taught(flat, teacher)
    assert main(asked([teacher], folder, *([] if trained else ["--dry-run"]))) == 0
    shutil.rmtree(teacher)
    taught(flat, teacher, seed=1, data=None if trained else {"seed": 1})
    capsys.readouterr()
    others = "" if trained else " and the images in their splits and the teacher's data settings"
    assert f"the teacher's weights{others} are not those that this distillation began with" in mistake(asked([teacher], folder), capsys)
    assert (folder / "run").exists() == trained


def test_a_student_is_not_set_against_a_teacher_of_other_test_images(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "_answers", lambda *_: {"test/digit 0/another.png": 1.0})
    with pytest.raises(UserError, match="tested on other images than its teacher"):
        _accuracy(runs[0], teachers.opened(runs[:1]))


def test_training_images_that_changed_are_refused(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The test images are as they were: what the student would learn from is not."""
    pictures = tmp_path / "pictures"
    shutil.copytree(digits, pictures)
    teacher = taught(pictures, tmp_path / "teacher")
    one, other = sorted((pictures / "train" / "digit 0").iterdir())[:2]
    one.write_bytes(other.read_bytes())
    said = mistake(asked([teacher], tmp_path / "small"), capsys)
    assert "the data is not what this run learned from" in said
    assert one.name in said
    assert not (tmp_path / "small").exists()


def test_a_run_is_the_same_however_its_path_is_spelled(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(asked(runs[:1], tmp_path / "small", "--dry-run")) == 0
    monkeypatch.chdir(runs[0].parent)
    assert main(asked([Path(runs[0].name)], tmp_path / "small", "--dry-run")) == 0
    assert "runs: " in mistake(asked([Path(runs[1].name)], tmp_path / "small", "--dry-run"), capsys)
