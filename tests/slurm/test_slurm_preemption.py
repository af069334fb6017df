"""On a real Slurm: a preempted job saves, is requeued once, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from slurm.cluster import ROOT, Cluster
from slurm.lab import RECIPE, Submitted, assert_same_run, cluster, cwd, launch

__all__ = ["cluster", "cwd"]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

LONG = ("--stages.1.epochs", "60")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = launch(cluster, tmp_path_factory.mktemp("undisturbed"), words=LONG)
    assert job.wait()["JobState"] == "COMPLETED", job.log
    return job.run


def preempt(job: Submitted) -> None:
    """What Slurm does by --signal=B:USR2@120, without the wait."""
    job.cluster.slurm("scancel", "--signal=USR2", "--batch", job.id)


def assert_requeued_once(job: Submitted, undisturbed: Path) -> None:
    end = job.wait()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log
    assert [e["action"] for e in job.ends] == ["requeue", "finished"]
    assert job.outcome["outcome"] == "finished"
    assert_same_run(job.run, undisturbed)


def test_preempted_in_the_middle_of_a_stage(cluster: Cluster, cwd: Path, undisturbed: Path) -> None:
    """With W&B offline: the requeued job goes on with the same W&B run."""
    job = launch(cluster, cwd, words=(*LONG, "--wandb", "offline"))
    job.wait_for("all  epoch   5")
    preempt(job)
    job.wait_for("launch  requeue: preempted")
    assert job.outcome["signal"] == "SIGUSR2"
    assert_requeued_once(job, undisturbed)
    assert "resume  from stage all, step" in job.log
    (wandb_id,) = {path.name.rpartition("-")[2] for path in job.run.glob("wandb/offline-run-*")}
    assert wandb_id == (job.run / "wandb_id").read_text()
    assert len(list(job.run.glob("wandb/replaced/*-offline-run-*"))) == 1


def test_preempted_while_it_starts(cluster: Cluster, cwd: Path, undisturbed: Path) -> None:
    job = launch(cluster, cwd, words=LONG)
    job.wait_for("launch  start 0")
    preempt(job)
    assert_requeued_once(job, undisturbed)
    assert job.log.count("launch  requeue: preempted") == 1


def test_preempted_twice_in_the_middle_of_a_checkpoint(cluster: Cluster, cwd: Path, undisturbed: Path) -> None:
    """The process is held still inside a save until the signals are there; the save is finished, and the run goes on after it."""
    job = launch(cluster, cwd, words=(*LONG, "--save-steps", "1"))
    job.wait_for("all  epoch   5")
    (process,) = job.processes()
    held = hold_in_a_save(job, process)
    preempt(job)
    time.sleep(1)
    preempt(job)
    time.sleep(1)
    assert list((job.run / "checkpoints").glob(held.name)), "the save is still under way"
    os.kill(process, signal.SIGCONT)
    assert_requeued_once(job, undisturbed)
    assert not list((job.run / "checkpoints").glob("damaged-*"))
    assert not list((job.run / "checkpoints").glob(".*")), "nothing half-written is left"


def hold_in_a_save(job: Submitted, process: int) -> Path:
    """Stop a process while it has a checkpoint half-written, and return that checkpoint's temporary folder."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if list((job.run / "checkpoints").glob(".*.tmp")):
            os.kill(process, signal.SIGSTOP)
            time.sleep(0.05)
            still = list((job.run / "checkpoints").glob(".*.tmp"))
            if still:
                return still[0]
            os.kill(process, signal.SIGCONT)
    raise AssertionError(f"no save was caught\n{job.log}")


def test_requeued_at_most_so_many_times(cluster: Cluster, cwd: Path) -> None:
    job = launch(cluster, cwd, "--max-requeues", "0", words=LONG)
    job.wait_for("all  epoch")
    preempt(job)
    assert job.wait()["JobState"] == "FAILED"
    assert "max_requeues is 0; submit it again to go on" in job.log
    assert job.outcome["outcome"] == "stopped"


def test_preempted_by_slurm_itself(cluster: Cluster, cwd: Path, undisturbed: Path) -> None:
    """PreemptMode=REQUEUE: Slurm sends SIGTERM and requeues the job by itself; the run saves in the time of grace."""
    job = launch(cluster, cwd, "--partition", "spot", words=LONG)
    job.wait_for("all  epoch   5")
    script = ["--nodes=3", "--exclusive", "--time=1", "--partition=test", "--output=/dev/null", "--wrap=sleep 1"]
    urgent = cluster.slurm("sbatch", "--parsable", *script, cwd=cwd).strip()
    job.wait_for("launch  wait: Slurm preempts this job")
    assert job.outcome["signal"] == "SIGTERM"
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    end = job.wait(240)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), job.log
    assert [e["action"] for e in job.ends] == ["wait", "finished"]
    assert_same_run(job.run, undisturbed)


def test_the_time_limit_for_real(cluster: Cluster, cwd: Path) -> None:
    """A run longer than its job is told ahead of the limit, saves, is requeued, and goes on."""
    job = launch(cluster, cwd, "--time", "1", "--signal-s", "20", words=("--stages.1.epochs", "2000"))
    job.wait_for("launch  requeue: preempted", 150)
    assert "DUE TO TIME LIMIT" not in job.log
    job.wait_for("resume  from stage all, step", 90)
    cluster.slurm("scancel", job.id)
    assert job.wait()["JobState"] == "CANCELLED"
    assert job.ends[0]["outcome"] == "stopped"
    assert job.ends[0]["signal"] == "SIGUSR2"


def test_scancel_saves_and_requeues_nothing(cluster: Cluster, cwd: Path, undisturbed: Path) -> None:
    job = launch(cluster, cwd, words=LONG)
    job.wait_for("all  epoch   5")
    cluster.python("-m", "launcher", "cancel", str(job.run), cwd=cwd)
    end = job.wait()
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0"), job.log
    job.wait_for("launch  stopped: told to end by SIGTERM", 10)
    assert job.outcome["signal"] == "SIGTERM"
    assert job.processes() == []
    again = cluster.slurm("sbatch", "--parsable", str(job.run / "jobs" / f"{job.id}.sbatch"), cwd=cwd).strip()
    assert cluster.wait(again)["JobState"] == "COMPLETED"
    assert_same_run(job.run, undisturbed)


def test_a_run_on_two_nodes_goes_on_with_the_same_result(cluster: Cluster, cwd: Path) -> None:
    """Each of two nodes with two processes agrees on the step; preempted, and never preempted, end the same."""
    options = ("--nodes", "2", "--processes-per-node", "2", "--cpus", "2")
    words = ("--stages.1.epochs", "20")
    calm, disturbed = cwd / "calm", cwd / "disturbed"
    first = launch(cluster, cwd, *options, words=(*words, "--folder", str(calm)))
    assert first.wait()["JobState"] == "COMPLETED", first.log
    job = launch(cluster, cwd, *options, words=(*words, "--folder", str(disturbed)))
    job.wait_for("all  epoch   5")
    preempt(job)
    assert_requeued_once(job, calm)


def test_a_job_submitted_by_hand_is_requeued_too(cluster: Cluster, cwd: Path) -> None:
    words = [RECIPE, *LONG]
    options = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=1"]
    number = cluster.slurm("sbatch", *options, str(ROOT / "slurm" / "train.sbatch"), *words, cwd=cwd, TLTRAIN_PYTHON=sys.executable).strip()
    log = cwd / f"tltrain-{number}.log"
    cluster.wait_until(lambda: log.exists() and "all  epoch" in log.read_text(), 90, "trains")
    cluster.slurm("scancel", "--signal=USR2", "--batch", number)
    end = cluster.wait(number)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), log.read_text()
