"""`tltrain folds`: every image is judged once, finished folds are kept, and whatever stops it, the same command ends with the same bits."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_words import mistake
from conftest import HEAD, made_recipe
from page_reader import Page

from tltrain.cli.main import main
from tltrain.core.arguments import parsing
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.many import side_by_side
from tltrain.many.one_by_one import OneRun
from tltrain.many.side_by_side import train_side_by_side
from tltrain.runs import run_dir
from tltrain.runs.folds.folder import changes, create, read, wanted_folder
from tltrain.training import run as runs

COMMAND = ("--k", "3", "--workers", "0")
TRAIN = "tltrain.many.one_by_one.train"


def recipe_file(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    data = {"eval_limit": None, "seed": 4}
    (folder / "folded.yaml").write_text(
        made_recipe(name="folded", data=data, stages=[HEAD | {"carry": "best", "eval_epochs": 0.5}]).to_yaml()
    )
    return str(folder / "folded.yaml")


def results(folder: Path) -> dict[str, bytes]:
    """The bytes that must not depend on how often it was stopped."""
    names = [folder / "out_of_fold.csv", *sorted(folder.glob("r*/weights.safetensors")), *sorted(folder.glob("r*/test_predictions.csv"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folds")
    assert main(["folds", recipe_file(folder), *COMMAND, "--folder", str(folder / "folds")]) == 0
    return folder / "folds"


def test_every_image_is_judged_once_by_a_network_that_never_saw_it(undisturbed: Path) -> None:
    with (undisturbed / "out_of_fold.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["path"] for row in rows}) == len(rows) == 1797
    for fold in range(3):
        with gzip.open(undisturbed / f"r0-f{fold}" / "data.jsonl.gz") as lines:
            _, *samples = map(json.loads, lines)
        learned = {sample[0] for sample in samples if sample[1] in ("train", "val")}
        judged = {row["path"] for row in rows if row["fold"] == str(fold)}
        assert not learned & judged
        assert judged == {sample[0] for sample in samples if sample[1] == "test"}
    assert (undisturbed / "folds.html").is_file()
    assert "of 1,797 images are right" in Page(undisturbed / "folds.html").text


def test_the_same_command_again_trains_nothing(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(undisturbed)
    assert main(["folds", str(undisturbed.parent / "folded.yaml"), *COMMAND, "--folder", str(undisturbed)]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 runs are finished already" in said
    assert "of 1,797 images are right" in " ".join(said.split())
    assert results(undisturbed) == before
    assert len(run_dir.metrics_files(undisturbed / "r0-f0")) == 1
    (undisturbed / "folds.html").unlink()
    assert main(["report", str(undisturbed)]) == 0
    assert (undisturbed / "folds.html").is_file()


def test_another_recipe_or_number_of_folds_is_refused(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, folder = str(undisturbed.parent / "folded.yaml"), ("--folder", str(undisturbed))
    assert "batch: 16 -> 8" in mistake(["folds", recipe, *COMMAND, *folder, "--batch", "8"], capsys)
    assert "data.folds: 3 -> 4" in mistake(["folds", recipe, "--k", "4", *folder], capsys)
    assert "is the folder of a run" in mistake(["folds", recipe, *COMMAND, "--folder", str(undisturbed / "r0-f0")], capsys)
    assert "holds files and is no folder of folds" in mistake(["folds", recipe, *COMMAND, "--folder", str(undisturbed.parent)], capsys)
    assert "leave --out out" in mistake(["report", str(undisturbed), "--out", "x.html"], capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--k", "1"], "--k is 1; a network must learn from other images"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--k", "1798"], "the data cannot be parted into 1798 folds: 1797 images make 1797 groups"),
        (["--kk", "3"], "there is no flag --kk"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_fold(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in mistake(["folds", recipe_file(tmp_path / "r"), *words, "--folder", str(tmp_path / "folds")], capsys)
    assert not (tmp_path / "folds").exists()


def test_weights_that_have_learned_from_these_images_are_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """finished_run has learned from 60 images and chosen by val; all the others it has not seen."""
    with gzip.open(finished_run / "data.jsonl.gz") as lines:
        num = sum(json.loads(line)[1] in ("train", "val") for line in list(lines)[1:])
    for weights in (finished_run, finished_run / "weights.safetensors"):
        says = mistake(["folds", recipe_file(tmp_path), *COMMAND, "--backbone.weights", str(weights)], capsys)
        assert f"a run that has learned from {num:,} of these 1,797 images" in says
    assert not (tmp_path / "runs").exists()


def test_the_folder_that_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def taken(*words: str) -> str:
        parsed = parsing.parse_with("folds", ["digits-resnet", *words], changes(2, 1))
        folder = wanted_folder(parsed, 2, 1)
        if not folder.path.exists():
            create(folder)
            run_dir.create(folder.members[0].path, parsed[0][0])
        return folder.path.name

    assert taken() == "digits-resnet-folds"
    assert taken("--folder", "auto", "--batch", "8") == "digits-resnet-folds-2"
    assert taken("--folder", "auto") == "digits-resnet-folds", "it holds these very runs, and the same command goes on with them"
    assert taken("--folder", "auto", "--batch", "8") == "digits-resnet-folds-2"
    assert taken("--folder", "runs/own") == "own"


def test_a_stop_ends_with_75_and_the_same_command_goes_on(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["folds", recipe_file(tmp_path), *COMMAND, "--folder", str(tmp_path / "folds")]

    def stopped(when: Callable[[Recipe, int], bool]) -> int:
        def on_step(recipe: Recipe) -> Callable[[Any, int], None]:
            return lambda stage, step: os.kill(os.getpid(), signal.SIGTERM) if when(recipe, step) else None

        with monkeypatch.context() as patched:
            patched.setattr(TRAIN, lambda recipe, start: runs.train(recipe, start, on_step(recipe)))
            return main(command)

    assert stopped(lambda recipe, step: recipe.data.fold == 1 and step == 2) == 75
    assert run_dir.outcome(tmp_path / "folds" / "r0-f1")["outcome"] == "stopped"
    assert not (tmp_path / "folds" / "r0-f2").exists()
    assert "So far: 1 of 3 runs is finished." in " ".join(capsys.readouterr().out.split())
    assert main(command) == 0
    assert results(tmp_path / "folds") == results(undisturbed)


def test_a_signal_between_two_folds_stops_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def train(recipe: Recipe, start: Any) -> dict[str, Any]:
        begun.append(recipe.data.fold)
        os.kill(os.getpid(), signal.SIGTERM)
        return {"outcome": "finished"}

    monkeypatch.setattr(TRAIN, train)
    assert main(["folds", recipe_file(tmp_path), *COMMAND, "--folder", str(tmp_path / "folds")]) == 75
    assert begun == [0]


KILLED = """
import os, signal, sys
from tltrain.cli.main import main
from tltrain.many import one_by_one
real = one_by_one.train
def on_step(stage, step):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
one_by_one.train = lambda recipe, start: real(recipe, start, *([on_step] if recipe.data.fold == 1 else []))
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_changes_no_bit(undisturbed: Path, tmp_path: Path) -> None:
    command = ["folds", recipe_file(tmp_path), *COMMAND, "--save-steps", "1", "--folder", str(tmp_path / "folds")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert run_dir.outcome(tmp_path / "folds" / "r0-f0")["outcome"] == "finished"
    assert not run_dir.outcome(tmp_path / "folds" / "r0-f1")
    assert main(command) == 0
    assert results(tmp_path / "folds") == results(undisturbed)


@pytest.mark.slow
def test_side_by_side_gives_the_same_bits(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["folds", recipe_file(tmp_path), *COMMAND, "--jobs", "2", "--folder", str(tmp_path / "folds")]) == 0
    assert results(tmp_path / "folds") == results(undisturbed)
    assert "test    top-1" in (tmp_path / "folds" / "logs" / "r0-f0.log").read_text()


def test_more_repeats_are_added_to_those_that_are_there(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def train(recipe: Recipe, start: Any) -> dict[str, Any]:
        begun.append((recipe.data.repeat, recipe.data.fold))
        return {"outcome": "failed"}

    monkeypatch.setattr(TRAIN, train)
    command = ["folds", str(undisturbed.parent / "folded.yaml"), *COMMAND, "--folder", str(undisturbed)]
    assert main([*command, "--repeats", "2"]) == 1
    assert begun == [(1, 0)]
    assert read(undisturbed).repeats == 2
    (undisturbed / "folds.json").write_text('{"k": 3, "repeats": 1}')


def _does(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Runs side by side do what a script of bash says."""
    real = subprocess.Popen
    started = lambda command, **settings: real(["/bin/bash", "-c", script], **settings)  # noqa: E731
    monkeypatch.setattr("tltrain.many.side_by_side.subprocess.Popen", started)


def _runs(tmp_path: Path, num: int) -> list[OneRun]:
    return [OneRun(f"r0-f{i}", made_recipe(), RunFlags(folder=tmp_path / f"r0-f{i}")) for i in range(num)]


def test_a_failure_begins_no_further_run_and_lets_the_others_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _does(monkeypatch, 'echo "it broke"; [ "$OMP_NUM_THREADS" = 3 ] && exit 1; sleep 0.3; exit 1')
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    said: list[str] = []
    assert train_side_by_side(_runs(tmp_path, 5), 2, tmp_path / "logs", said.append) == "failed"
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["r0-f0.log", "r0-f1.log"]
    assert any("r0-f0    ended with exit code 1: it broke" in line for line in said)


def test_a_signal_reaches_every_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _does(monkeypatch, 'trap "exit 75" TERM; echo ready; for i in $(seq 100); do sleep 0.1; done; exit 0')
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "r0-f1    begun" in text:
            for name in ("r0-f0", "r0-f1"):
                while "ready" not in (tmp_path / "logs" / f"{name}.log").read_text():
                    pass
            os.kill(os.getpid(), signal.SIGTERM)

    assert train_side_by_side(_runs(tmp_path, 4), 2, tmp_path / "logs", say) == "stopped"
    assert len(list((tmp_path / "logs").iterdir())) == 2


def test_a_run_that_is_refused_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _does(monkeypatch, 'echo "tltrain: no such folder; give another"; exit 2')
    with pytest.raises(UserError, match="r0-f0 was refused: tltrain: no such folder; give another; the whole message stands in"):
        train_side_by_side(_runs(tmp_path, 2), 1, tmp_path / "logs", print)


@pytest.mark.parametrize(
    ("environment", "num_gpus", "slots"),
    [
        ({}, 2, [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "0"}]),
        ({"CUDA_VISIBLE_DEVICES": "3, GPU-a"}, 2, [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "GPU-a"}]),
        ({"OMP_NUM_THREADS": "5"}, 0, [{"OMP_NUM_THREADS": "5"}]),
    ],
)
def test_each_run_has_a_gpu_of_its_own(environment: dict[str, str], num_gpus: int, slots: list[dict[str, str]]) -> None:
    for slot, expected in enumerate(slots):
        assert side_by_side._place(slot, len(slots), environment, num_gpus)[0] == expected


def test_an_array_is_submitted_of_what_is_not_finished(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    recipe = str(undisturbed.parent / "folded.yaml")
    dry = ["--slurm", "--dry-run", "--time", "1:00:00"]
    assert main(["folds", recipe, *COMMAND, "--repeats", "2", "--folder", str(undisturbed), *dry]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-2\n" in script
    assert "values=(r1-f0 r1-f1 r1-f2)" in script
    assert "#SBATCH --time=1:00:00\n" in script
    assert f'--folder {undisturbed}/"$value"' in script
    assert not (undisturbed / "r1-f0").exists()
    assert read(undisturbed).repeats == 1
    assert main(["folds", recipe, *COMMAND, "--folder", str(undisturbed), *dry]) == 0
    assert "3 of 3 runs are finished" in capsys.readouterr().out
    says = mistake(["folds", recipe, "--k", "2", "--folder", str(tmp_path / "new"), "--slurm", "--array", "seed=0,1"], capsys)
    assert "are an array already" in says
