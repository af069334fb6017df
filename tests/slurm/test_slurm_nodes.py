"""On a real Slurm: nodes that die, nodes that are cut off, processes that crash."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from slurm.cluster import Cluster
from slurm.lab import Submitted, assert_same_run, cluster, cwd, launch

__all__ = ["cluster", "cwd"]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

LONG = ("--stages.1.epochs", "60", "--save-steps", "5")
TWO_NODES = ("--nodes", "2")


def test_a_node_that_dies_is_left_behind(cluster: Cluster, cwd: Path) -> None:
    """Slurm notices, and the job goes on from its last checkpoint on the nodes that are left."""
    job = launch(cluster, cwd, *TWO_NODES, words=LONG)
    job.wait_for("all  epoch  1")
    lost = cluster.fields(job.id)["NodeList"]
    assert lost == "n[1-2]"
    cluster.crash("n2")
    try:
        end = job.wait(240)
    finally:
        cluster.boot("n2")
    assert (end["JobState"], end["Restarts"], end["NodeList"]) == ("COMPLETED", "1", "n[1,3]"), job.log
    assert "resume  from stage all, step" in job.log
    assert job.outcome["outcome"] == "finished"
    cluster.wait_idle()


def test_a_node_that_an_administrator_takes_away(cluster: Cluster, cwd: Path) -> None:
    job = launch(cluster, cwd, *TWO_NODES, words=LONG)
    job.wait_for("all  epoch  1")
    cluster.slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.slurm("scontrol", "update", "nodename=n2", "state=drain", "reason=test")  # else it is back as soon as its slurmd reports
    try:
        end = job.wait()
    finally:
        cluster.slurm("scontrol", "update", "nodename=n2", "state=resume")
    assert (end["JobState"], end["Restarts"], end["NodeList"]) == ("COMPLETED", "1", "n[1,3]"), job.log
    assert "resume  from stage all, step" in job.log
    cluster.wait_idle()


def test_a_node_that_is_cut_off_spoils_nothing(cluster: Cluster, cwd: Path) -> None:
    """The job restarts elsewhere while its old process still trains; that one stops itself, and the result is as if it had never been."""
    calm = launch(cluster, cwd, words=(*LONG, "--folder", str(cwd / "calm")))
    assert calm.wait()["JobState"] == "COMPLETED", calm.log
    job = launch(cluster, cwd, words=LONG)
    job.wait_for("all  epoch   5")
    (old,) = job.processes()
    os.kill(old, signal.SIGSTOP)  # so that it is not finished before the job restarts
    (name,) = [name for name in cluster.names if cluster.processes(name, "launcher.worker")]
    cluster.unplug(name)
    try:
        cluster.wait_until(lambda: cluster.fields(job.id).get("Restarts") == "1", 90, "the job restarts")
        job.wait_for("resume  from stage", 90)
        os.kill(old, signal.SIGCONT)
        end = job.wait()
        assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), job.log
        cluster.wait_until(lambda: not cluster.processes(name, "launcher.worker"), 60, "the old process stops")
    finally:
        cluster.plug(name)
    cluster.wait_idle(90)
    assert_same_run(job.run, calm.run)
    assert job.outcome["outcome"] == "finished"
    assert not list((job.run / "checkpoints").glob("damaged-*"))


BOOM = """\
import os, signal
if "TLTRAIN_NOTES" in os.environ and os.environ.get("RANK") == "1":
    def boom(number, frame):
        raise RuntimeError("boom of rank 1")
    signal.signal(signal.SIGUSR1, boom)
"""


def crash(job: Submitted, number: int) -> None:
    job.wait_for("all  epoch   5")
    os.kill(job.processes()[1], number)


@pytest.mark.parametrize("kind", ["exception", "killed"])
def test_a_crash_in_one_rank_fails_the_job_and_names_it(cluster: Cluster, cwd: Path, kind: str) -> None:
    """By an exception, or by SIGKILL as when memory is short; rank 1 runs on the second node."""
    (cwd / "sitecustomize.py").write_text(BOOM)
    path = f"{cwd}:{cluster.environment['PYTHONPATH']}"
    job = launch(cluster, cwd, *TWO_NODES, words=LONG, PYTHONPATH=path)
    crash(job, signal.SIGUSR1 if kind == "exception" else signal.SIGKILL)
    end = job.wait()
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0"), job.log
    outcome = job.outcome
    assert outcome["outcome"] == "failed"
    assert outcome["host"] == "n2"
    if kind == "exception":
        assert outcome["rank"] == 1
        assert outcome["error"] == "RuntimeError: boom of rank 1"
        assert "launch  rank 1 on n2 failed first: RuntimeError: boom of rank 1" in job.log
        assert "in boom\n" in job.log, "the traceback stands in the job's log"
    else:
        assert outcome["node"] == 1
        assert "SIGKILL" in job.log.partition("failed first")[2]
    assert job.processes() == []
    assert "boom" in cluster.python("-m", "launcher", "status", str(job.run), cwd=cwd).stdout or kind == "killed"


def test_a_crashed_job_is_requeued_as_often_as_asked(cluster: Cluster, cwd: Path) -> None:
    job = launch(cluster, cwd, "--max-crash-requeues", "1", words=LONG)
    job.wait_for("all  epoch   5")
    os.kill(job.processes()[0], signal.SIGKILL)
    job.wait_for("launch  requeue: crashed")
    job.wait_for("resume  from stage")
    time.sleep(1)
    os.kill(job.processes()[0], signal.SIGKILL)
    end = job.wait()
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "1"), job.log
    assert [e["action"] for e in job.ends] == ["requeue", "failed"]
    assert "failed first: processes ended with code 1 and left no note of a failure: killed from outside" in job.log


def test_a_second_start_beside_a_healthy_run_is_refused(cluster: Cluster, cwd: Path) -> None:
    job = launch(cluster, cwd, words=(*LONG, "--stages.1.epochs", "250"))
    job.wait_for("all  epoch   5")
    twin = cluster.slurm("sbatch", "--parsable", str(job.run / "jobs" / f"{job.id}.sbatch"), cwd=cwd).strip()
    assert cluster.wait(twin)["JobState"] == "FAILED"
    log = (job.run / "jobs" / f"{twin}.log").read_text()
    assert "--take-over" in log
    assert "Traceback" not in log
    end = job.wait()
    assert end["JobState"] == "COMPLETED", job.log
    assert json.loads((job.run / "outcome.json").read_text())["outcome"] == "finished"
