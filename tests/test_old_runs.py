"""Run folders, recipes, job scripts and stores of tltrain 0.1.0 still work.

`data/runs-0.1.0.tar.xz` was made by that version on a CPU: a finished run of two stages; one stopped in its second stage, with a job
script; an array over two seeds; and the stores of the first. @RUNS@ stands for the folder they lay in, @PYTHON@ for the interpreter.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tltrain
from tltrain.cli.main import main
from tltrain.core.arguments.parsing import parse
from tltrain.core.flags import RunFlags
from tltrain.evaluation.evaluate import evaluate
from tltrain.runs.metrics_log import read_rows

ARCHIVE = Path(__file__).parent / "files" / "runs-0.1.0.tar.xz"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture
def old(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the runs, with paths of today in their files."""
    root = tmp_path / "old"
    shutil.copytree(unpacked, root)
    for path in (*root.rglob("*.json"), *root.rglob("*.sbatch"), *root.glob("*/generations/*")):
        path.write_text(path.read_text().replace("@RUNS@", str(root)).replace("@PYTHON@", sys.executable))
    monkeypatch.setenv("TLTRAIN_CACHE", str(root / "cache"))
    return root


def test_a_finished_run_is_evaluated_to_its_figures(old: Path) -> None:
    kept = json.loads((old / "finished" / "test_metrics.json").read_text())
    again = evaluate(old / "finished", None, "test", 128)
    assert [again[name] for name in ("n", "top1")] == [kept[name] for name in ("n", "top1")]
    assert again["loss"] == pytest.approx(kept["loss"], rel=1e-4)
    run = tltrain.load(old / "finished")
    assert run.outcome["outcome"] == "finished"
    assert run.metrics == kept
    assert {row["kind"] for row in run.history} == {"train", "val", "stage_end", "test"}
    assert run.model(torch.zeros((2, 3, 32, 32), dtype=torch.uint8)).shape == (2, 10)


def test_the_same_command_says_that_it_is_finished(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(old / "micro.yaml"), "--folder", str(old / "finished"), "--keep", "1", "--store", "always"]) == 0
    said = capsys.readouterr()
    assert "is finished already" in said.out
    assert said.err == "--store is now called --cache; the old name will go with the next version\n"


def test_a_stopped_run_goes_on_from_where_it_was(old: Path) -> None:
    before, rows = json.loads((old / "stopped" / "outcome.json").read_text()), read_rows(old / "stopped")
    assert (before["outcome"], before["stage"], before["step"]) == ("stopped", "all", 8)
    script = (old / "stopped" / "jobs" / "4711.sbatch").read_text()
    words = re.search(r"set -- (train .*)$", script, re.MULTILINE)
    assert words is not None
    assert main([*words[1].split(), "--workers", "0"]) == 0
    after = read_rows(old / "stopped")
    assert after[: len(rows)] == rows, "what was trained is not trained again"
    assert [(row["kind"], row["step"]) for row in after if row["kind"] in ("stage_end", "test")][-2:] == [("stage_end", 12), ("test", 12)]
    head = load_file(old / "stopped" / "stages" / "0-head" / "weights.safetensors")
    theirs = load_file(old / "finished" / "stages" / "0-head" / "weights.safetensors")
    assert all(torch.equal(head[name], theirs[name]) for name in theirs)


def test_its_job_script_is_asked_and_answered(old: Path) -> None:
    """What the script runs before and after the processes, and in each of them."""
    run, python = old / "stopped", [sys.executable, "-m"]

    def said(*words: str) -> str:
        done = subprocess.run([*python, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    words = ["train", str(run / "recipe.yaml"), "--folder", str(run), "--keep", "1"]
    assert said("launcher.batch", "begin", "--job", "4711", "--", *words) == str(run)
    end = ["--max-requeues", "50", "--max-crash-requeues", "0", "--preempted", "yes"]
    assert said("launcher.batch", "end", "--run", str(run), "--job", "4711", *end).splitlines()[-1].split()[0] == "requeue"
    assert "--main-node" in said("launcher.node", "--help")


def test_an_array_is_compared_and_its_jobs_are_known(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(old / "micro-by-seed" / seed) for seed in "01"]
    assert main(["compare", *runs, "--out", str(tmp_path / "page.html")]) == 0
    assert "seed" in (tmp_path / "page.html").read_text()
    kept = json.loads((old / "micro-by-seed" / "jobs" / "4711.json").read_text())
    assert kept["runs"] == runs
    assert main(["launch", "status", str(old / "micro-by-seed")]) in (0, 2)
    said = capsys.readouterr()
    assert "finished" in said.out or "no Slurm" in said.err


def test_it_is_exported_predicted_and_reported(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from digit_files import digit_image

    digit_image(3).save(tmp_path / "3.png")
    assert main(["predict", str(old / "finished"), str(tmp_path / "3.png"), "--csv"]) == 0
    assert "3.png" in capsys.readouterr().out
    assert main(["export", str(old / "finished"), "--to", "torch-export", "--out", str(tmp_path / "out")]) == 0
    assert main(["report", str(old / "finished")]) == 0
    assert "<svg" in (old / "finished" / "report.html").read_text()


def test_old_flags_are_read_as_new_ones(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = ["--store", "never", "--store-images=always", "--store_device_gb", "1", "--store-memory-gb", "2", "--store-disk-gb=3"]
    now = [word.replace("--store", "--cache") for word in before]
    old, new = (parse("plan", ["digits-resnet", *words])[1] for words in (before, now))
    assert old == new == RunFlags(None, cache="never", cache_images="always", cache_device_gb=1, cache_memory_gb=2, cache_disk_gb=3)
    assert [line.partition(";")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"{word} is now called {word.replace('store', 'cache').replace('_', '-')}"
        for word in (w.partition("=")[0] for w in before)
        if word[:2] == "--"
    ]
    monkeypatch.setenv("RANK", "1")
    assert parse("plan", ["digits-resnet", *before])[1] == new
    assert capsys.readouterr().err == "", "one process of a run says it"


def test_its_stores_are_listed_and_cleared(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "ls"]) == 0
    said = capsys.readouterr()
    assert "4 caches" in said.out
    assert said.err == "tltrain store is now called tltrain cache; the old name will go with the next version\n"
    assert main(["store", "clear", "--all"]) == 0
    assert not list((old / "cache" / "store").iterdir())
