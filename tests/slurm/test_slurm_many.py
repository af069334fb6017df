"""On a real Slurm: a teacher and then its student, and arrays of runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from slurm.cluster import ROOT, Cluster
from slurm.lab import ON_CPU, RECIPE, cluster, cwd

__all__ = ["cluster", "cwd"]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TEACHER = (RECIPE, "--stages.1.epochs", "1", "--folder", "runs/teacher")
STUDENT = (str(Path(RECIPE).with_name("student.yaml")), "--folder", "runs/student")


def outcome(run: Path) -> str:
    return str(json.loads((run / "outcome.json").read_text())["outcome"])


def chain(cluster: Cluster, cwd: Path, *teacher: str) -> list[str]:
    command = ["-m", "launcher", "slurm", *ON_CPU, "--", "train", *TEACHER, *teacher, "--", "train", *STUDENT]
    return re.findall(r"job (\d+) submitted", cluster.python(*command, cwd=cwd).stdout)


def test_the_student_starts_when_the_teacher_is_finished(cluster: Cluster, cwd: Path) -> None:
    first, second = chain(cluster, cwd)
    assert cluster.fields(second)["Dependency"].startswith(f"afterok:{first}")
    assert cluster.wait(first)["JobState"] == "COMPLETED"
    assert cluster.wait(second)["JobState"] == "COMPLETED"
    assert outcome(cwd / "runs" / "student") == "finished"
    assert "teacher top-1" in (cwd / "runs" / "student" / "jobs" / f"{second}.log").read_text()


def test_the_student_never_starts_when_the_teacher_fails(cluster: Cluster, cwd: Path) -> None:
    first, second = chain(cluster, cwd, "--data.source", "folder:nowhere")
    assert cluster.wait(first)["JobState"] == "FAILED"
    assert cluster.wait(second, 60)["JobState"] == "CANCELLED"
    assert not (cwd / "runs" / "student" / "outcome.json").exists()
    assert not (cwd / "runs" / "student" / "jobs" / f"{second}.log").exists()
    log = (cwd / "runs" / "teacher" / "jobs" / f"{first}.log").read_text()
    assert "nowhere" in log
    assert "launch  failed" in log


@pytest.mark.parametrize("works", [True, False])
def test_the_chain_by_hand(cluster: Cluster, cwd: Path, works: bool) -> None:
    teacher = TEACHER if works else (*TEACHER, "--data.source", "folder:nowhere")
    options = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--time=7"]
    command = ["sbatch", *options, str(ROOT / "slurm" / "chain.sbatch"), *teacher, "--", *STUDENT]
    first = cluster.slurm(*command, cwd=cwd, TLTRAIN_PYTHON=sys.executable).strip()
    assert cluster.wait(first)["JobState"] == ("COMPLETED" if works else "FAILED"), (cwd / f"tltrain-{first}.log").read_text()
    said = re.search(r"Submitted batch job (\d+)", (cwd / f"tltrain-{first}.log").read_text())
    assert said
    end = cluster.wait(said[1])
    assert (end["JobState"], end["TimeLimit"]) == ("COMPLETED" if works else "CANCELLED", "00:07:00")
    assert (cwd / "runs" / "student" / "outcome.json").exists() is works


def test_an_array_of_seeds_gives_a_run_folder_each(cluster: Cluster, cwd: Path) -> None:
    command = ["-m", "launcher", "slurm", *ON_CPU, "--array", "seed=0,1,2", "--", "train", RECIPE, "--stages.1.epochs", "1"]
    said = cluster.python(*command, cwd=cwd).stdout
    job = re.findall(r"job (\d+) submitted", said)[0]
    parent = cwd / "runs" / "lab-by-seed"
    cluster.wait_until(lambda: not cluster.slurm("squeue", "--noheader", "--job", job), 180, "the array ended")
    assert [outcome(parent / seed) for seed in "012"] == ["finished"] * 3
    assert len({(parent / seed / "weights.safetensors").read_bytes() for seed in "012"}) == 3
    for index in range(3):
        assert "launch  finished" in (parent / "jobs" / f"{job}_{index}.log").read_text()
    status = cluster.python("-m", "launcher", "status", str(parent), cwd=cwd).stdout
    assert status.count(": finished") == 3


def test_an_array_of_folds_is_put_together_by_report(cluster: Cluster, cwd: Path) -> None:
    command = ["-m", "tltrain", "folds", RECIPE, "--stages.1.epochs", "1", "--k", "2", "--slurm", *ON_CPU]
    said = cluster.python(*command, cwd=cwd).stdout
    job = re.findall(r"job (\d+) submitted", said)[0]
    folds = cwd / "runs" / "lab-folds"
    cluster.wait_until(lambda: not cluster.slurm("squeue", "--noheader", "--job", job), 180, "the array ended")
    assert [outcome(folds / name) for name in ("r0-f0", "r0-f1")] == ["finished"] * 2
    assert "of 64 images are right" in " ".join(cluster.python("-m", "tltrain", "report", str(folds), cwd=cwd).stdout.split())
    assert "2 of 2 runs are finished" in cluster.python(*command, cwd=cwd).stdout


def test_an_array_by_hand_and_one_of_its_runs_preempted(cluster: Cluster, cwd: Path) -> None:
    script = [str(ROOT / "slurm" / "array.sbatch"), "stages.1.lr", "1e-3", "2e-3", "--", RECIPE, "--stages.1.epochs", "30"]
    options = ["--parsable", "--array=0-1", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = cluster.slurm("sbatch", *options, *script, cwd=cwd, TLTRAIN_PYTHON=sys.executable).strip()
    logs = [cwd / f"tltrain-{job}_{index}.log" for index in range(2)]
    cluster.wait_until(lambda: logs[0].exists() and "all  epoch" in logs[0].read_text(), 120, "the first trains")
    cluster.slurm("scancel", "--signal=USR2", "--batch", f"{job}_0")
    cluster.wait_until(lambda: not cluster.slurm("squeue", "--noheader", "--job", job), 240, "the array ended")
    assert [outcome(cwd / "runs" / "by-stages.1.lr" / value) for value in ("1e-3", "2e-3")] == ["finished"] * 2
    assert [log.read_text().count("launch  requeue") for log in logs] == [1, 0]
