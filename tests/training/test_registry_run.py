"""Another package adds trackers, an exporter and a place to run by one file and one line each: no file of ours knows of it.

The files of docs/extending.md are among them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from foreign_package import install

from tltrain.cli.main import main
from tltrain.core import registry
from tltrain.core.recipe import Recipe
from tltrain.evaluation.exporters import export
from tltrain.runs.metrics_log import read_rows

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = '''
"""Trackers, an exporter and a target of somebody else."""

import json, subprocess, sys, threading
from pathlib import Path

import launcher.jobs
from launcher.target import Target
from launcher.command import read, split
from tltrain.runs.trackers import RunTracker


class Lines(RunTracker):
    """What it is told, a line each, in the run folder."""

    def open(self, run):
        self.file = run.path / "lines.jsonl"
        self.write("open", run.name, run.recipe["batch"], list(run.stage_steps), run.flags.keep)

    def log(self, row):
        self.write("log", row)

    def plan(self, text):
        self.write("plan", text)

    def summary(self, values):
        self.write("summary", values)

    def weights(self, weights, name, teacher=None):
        self.write("weights", weights.name, weights.is_file(), name, teacher)

    def close(self):
        self.write("close")

    def write(self, *told):
        with self.file.open("a") as file:
            file.write(json.dumps(told) + "\\n")


class Broken(RunTracker):
    def fail(self, *told):
        raise ConnectionError("no way home")

    open = log = plan = preview = confusion = mistakes = summary = weights = close = fail


class Stuck(RunTracker):
    def log(self, row):
        threading.Event().wait()


def launch(words):
    """In a process of its own, and kept as a job."""
    own, (training,) = split(words)
    run = read(training)
    launcher.jobs.keep(run.run, "toy", "toy-1", [run], own=own)
    return subprocess.run([sys.executable, "-m", "tltrain", *training]).returncode


def state(job):
    return f"{job} is in toyland"


TARGET = Target("[--own] -- train RECIPE …     in toyland", launch, state)
'''
PRINTED, PICKLE, NOHUP = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
POINTS = """
[tltrain.trackers]
lines = toy_run:Lines
printed = toy_printed:Printed
broken = toy_run:Broken
stuck = toy_run:Stuck
absent = toy_run:Absent

[tltrain.exporters]
pickle = toy_exporter:PICKLE

[tltrain.targets]
toy = toy_run:TARGET
nohup = toy_nohup:NOHUP
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    modules = {"toy_run": PACKAGE, "toy_printed": PRINTED, "toy_exporter": PICKLE, "toy_nohup": NOHUP}
    return install(tmp_path_factory.mktemp("site-packages"), "toy_run", modules, POINTS)


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package stands on the path of this process."""
    monkeypatch.syspath_prepend(str(site))
    registry._others.cache_clear()
    yield
    registry._others.cache_clear()


@pytest.fixture(scope="module")
def launched(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(the folder of a run that the target started with four trackers, what was printed)."""
    from conftest import made_recipe

    home = tmp_path_factory.mktemp("launched")
    (home / "micro.yaml").write_text(made_recipe().to_yaml())
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "TLTRAIN_CACHE": str(home / "cache"), "HOME": str(home)}
    own = ["--keep", "3", "--workers", "0", "--timeout-minutes", "0.1", "--trackers", "broken", "lines", "stuck", "printed"]
    words = ["launch", "toy", "--own", "--", "train", "micro.yaml", "--folder", "run", *own]
    command = [sys.executable, "-m", "tltrain", *words]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "run", done.stdout


def test_a_tracker_is_told_of_the_whole_run(launched: tuple[Path, str]) -> None:
    run, printed = launched
    told = [json.loads(line) for line in (run / "lines.jsonl").read_text().splitlines()]
    assert told[0] == ["open", "run", 16, [4, 5], 3]
    assert told[1] == ["plan", (run / "plan.txt").read_text()]
    rows = read_rows(run)
    assert [row for name, *(row,) in (each for each in told if each[0] == "log")] == [
        {name: value for name, value in row.items() if name != "time"} for row in rows
    ]
    test = json.loads((run / "test_metrics.json").read_text())
    summary, weights, end = told[-3:]
    assert (summary[0], summary[1]["test/top1"]) == ("summary", test["top1"])
    assert weights == ["weights", "weights.safetensors", True, "micro", None]
    assert end == ["close"]
    heads = [f"{row['kind']} {row['run_step']} " for row in rows]
    lines = [re.sub(r"^\d\d:\d\d:\d\d +", "", line) for line in printed.splitlines()]  # a log has the time before each line
    assert [line for line in lines if line.startswith(tuple(heads))] == [
        f"{head}{row.get('loss')}" for head, row in zip(heads, rows, strict=True)
    ], "a tracker may override log alone"


def test_trackers_that_raise_or_never_answer_are_said_once_and_stop_nothing(launched: tuple[Path, str]) -> None:
    run, printed = launched
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "finished"
    lines = [line for line in printed.splitlines() if line.startswith("tracker ")]
    after = "; this run goes on without it, metrics-*.jsonl has everything"
    assert lines == [f"tracker broken: ConnectionError: no way home{after}", f"tracker stuck: no answer for 3 s{after}"]


def test_a_target_has_the_job_of_its_run(launched: tuple[Path, str], installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = launched
    assert json.loads((run / "jobs" / "toy-1.json").read_text())["own"] == ["--own"]
    assert main(["launch", "status", str(run)]) == 0
    assert capsys.readouterr().out == f"job toy-1: toy-1 is in toyland\n{run}: finished\n"
    assert main(["launch", "cancel", str(run)]) == 2
    assert "job toy-1 cannot be cancelled from here" in capsys.readouterr().err
    assert main(["launch", "toy", "--", "train", str(run / "recipe.yaml"), "--folder", str(run)]) == 0
    assert "is finished already: see " in "".join(capsys.readouterr())
    assert main(["launch", "--help"]) == 0
    usage = capsys.readouterr().out
    assert "  tltrain launch toy [--own] -- train RECIPE …\n      in toyland\n" in usage
    assert "  tltrain launch nohup -- train RECIPE …\n" in usage
    assert usage.index("launch slurm") < usage.index("launch toy") < usage.index("launch status")


def test_a_job_of_a_target_that_is_gone_is_named(launched: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    registry._others.cache_clear()
    assert main(["launch", "status", str(launched[0])]) == 2
    assert "job toy-1 of" in (said := capsys.readouterr().err)
    assert "was submitted to the target 'toy'; it can be local, slurm" in said


def test_an_exporter_is_checked_like_ours(launched: tuple[Path, str], installed: None, tmp_path: Path) -> None:
    done = export(launched[0], "pickle", tmp_path / "out")
    assert done.difference <= 1e-4
    assert done.notes == ()
    assert sorted(path.name for path in done.folder.iterdir()) == ["README.md", "classes.json", "net.pt"]
    assert (done.folder / "README.md").read_text().startswith("# micro\n")
    assert "Open `net.pt` with torch and tltrain." in (done.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "RECIPE", "--trackers", "line"], "--trackers has 'line'; did you mean lines?"),
        (
            ["plan", "RECIPE", "--trackers", "lines", "xyz"],
            "--trackers has 'xyz'; it can be wandb, tensorboard, mlflow, trackio, absent, broken, lines, ",
        ),
        (["launch", "slurm", "--dry-run", "--", "train", "RECIPE", "--trackers", "line"], "--trackers has 'line'; did you mean lines?"),
        (["train", "RECIPE", "--trackers", "absent"], "--trackers has 'absent', which toy_run:Absent of another package provides, and"),
        (["launch", "toi", "--", "train", "RECIPE"], "launch knows no 'toi'; did you mean toy?"),
        (["export", "RUN", "--to", "pickel"], "--to is 'pickel'; did you mean pickle?"),
    ],
)
def test_a_wrong_name_is_refused_with_a_suggestion(
    words: list[str],
    says: str,
    installed: None,
    made_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "micro.yaml").write_text(made_recipe().to_yaml())
    monkeypatch.chdir(tmp_path)
    given = {"RECIPE": ["micro.yaml", *([] if words[0] == "launch" and words[1] == "toi" else ["--folder", "run"])], "RUN": ["run"]}
    assert main([each for word in words for each in given.get(word, [word])]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "refused before the first step"


def test_the_help_of_export_names_it(installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "hf, torchvision, timm, onnx, torch-export, pickle" in " ".join(capsys.readouterr().out.split())
