"""On a real Slurm: the same words give the same weights as on this machine, whatever the number of nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.cluster import ROOT, Cluster
from slurm.lab import ON_CPU, assert_same_run, cluster, cwd, launch

__all__ = ["cluster", "cwd"]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# The shipped recipe on a tenth of its images.
DIGITS = ("digits-resnet", "--data.per-class", "10", "--data.eval-limit", "32", "--stages.0.epochs", "1")


def locally(cluster: Cluster, cwd: Path, processes: int) -> Path:
    command = [sys.executable, "-m", "launcher", "local", "--accelerate", "cpu", "--processes", str(processes)]
    run = cwd / "local"
    done = subprocess.run(
        [*command, "--", "train", *DIGITS, "--folder", str(run)], cwd=cwd, env=cluster.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (2, 2)])
def test_the_weights_equal_those_of_a_local_run(cluster: Cluster, cwd: Path, nodes: int, per_node: int) -> None:
    shape = ("--nodes", str(nodes), "--processes-per-node", str(per_node), "--cpus", str(per_node))
    job = launch(cluster, cwd, *shape, recipe=DIGITS[0], words=DIGITS[1:])
    end = job.wait()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "0"), job.log
    assert f"{nodes * per_node} processes in all" in job.log
    assert {p.name for p in (job.run / "jobs" / job.id).glob("node-*.log")} == {f"node-{i}.log" for i in range(nodes)}
    assert json.loads((job.run / "env.json").read_text())["accelerate"]["processes"] == nodes * per_node
    assert_same_run(job.run, locally(cluster, cwd, nodes * per_node))
    said = cluster.python("-m", "launcher", "status", str(job.run), cwd=cwd).stdout
    assert f"job {job.id}: COMPLETED" in said
    assert f"{job.run}: finished" in said


def test_the_kept_script_repeats_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """In a folder whose name needs quotes everywhere; a W&B key in the environment stands in no file afterwards."""
    odd, key = tmp_path / "my $(runs); ünd spaces", "canary0123456789abcdef0123456789abcdef0123"
    odd.mkdir()
    job = launch(cluster, odd, recipe=DIGITS[0], words=(*DIGITS[1:], "--wandb", "offline"), WANDB_API_KEY=key)
    assert job.wait()["JobState"] == "COMPLETED", job.log
    assert "launch  finished" in job.log, "Slurm's own log is where the launcher said"
    kept = job.run / "jobs" / f"{job.id}.sbatch"
    again = cluster.slurm("sbatch", "--parsable", str(kept), cwd=odd).strip()
    assert cluster.wait(again)["JobState"] == "COMPLETED"
    assert "is finished already" in (job.run / "jobs" / f"{again}.log").read_text()
    holding = [p for p in tmp_path.rglob("*") if p.is_file() and key.encode() in p.read_bytes()]
    assert holding == []


def test_plain_sbatch_by_hand(cluster: Cluster, cwd: Path) -> None:
    words = list(DIGITS)
    options = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = cluster.slurm("sbatch", *options, str(ROOT / "slurm" / "train.sbatch"), *words, cwd=cwd, TLTRAIN_PYTHON=sys.executable).strip()
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert json.loads((cwd / "runs" / "digits-resnet" / "outcome.json").read_text())["outcome"] == "finished"
    assert "launch  finished" in (cwd / f"tltrain-{job}.log").read_text()


def test_a_mistake_never_reaches_the_queue(cluster: Cluster, cwd: Path) -> None:
    queue = cluster.slurm("squeue", "--noheader", "--states=all", "--format=%i")
    for options, words, said in [
        ((), ("--data.flipp", "true"), "flip"),
        ((), ("--batch", "0"), "batch"),
        (("--partition", "tset"), (), "tset"),
        (("--nodes", "99"), (), "Slurm refuses this job"),
        (("--accelerate", "ddp"), (), "--gpus-per-node 0"),
        (("--gpus-per-node", "2", "--accelerate", "dpp"), (), "there are cpu, ddp"),
    ]:
        command = ["-m", "launcher", "slurm", *ON_CPU, *options, "--", "train", "digits-resnet", *words]
        done = cluster.python(*command, cwd=cwd, check=False)
        assert done.returncode == 2, done.stdout
        assert said in done.stderr + done.stdout
        assert "Traceback" not in done.stderr
    dry = cluster.python("-m", "launcher", "slurm", *ON_CPU, "--dry-run", "--", "train", "digits-resnet", cwd=cwd)
    assert "#SBATCH --nodes=1\n" in dry.stdout
    assert list(cwd.iterdir()) == [], "neither a mistake nor a dry run leaves anything behind"
    assert cluster.slurm("squeue", "--noheader", "--states=all", "--format=%i") == queue


@pytest.mark.parametrize("template", sorted(p.name for p in (ROOT / "slurm").glob("*.sbatch")))
def test_slurm_accepts_every_template_with_every_directive(cluster: Cluster, cwd: Path, template: str) -> None:
    path = ROOT / "slurm" / template
    cluster.slurm("sbatch", "--test-only", str(path), "digits-resnet", cwd=cwd)
    full = ["--nodes=3", "--gpus-per-node=8", "--mem=64G", "--constraint=fast", "--partition=spot", "--time=1-00:00:00", "--exclusive"]
    cluster.slurm("sbatch", "--test-only", *full, str(path), "digits-resnet", cwd=cwd)
    done = cluster.inside("ctl", "sbatch", "--test-only", "--gpus-per-node=9", str(path), "digits-resnet", cwd=cwd, check=False)
    assert done.returncode != 0, "this cluster has 8 GPUs a node, so the test can fail"


def test_slurm_accepts_every_option_of_the_launcher(cluster: Cluster, cwd: Path) -> None:
    options = [
        "--nodes", "3", "--gpus-per-node", "8", "--cpus", "16", "--memory", "64G", "--time", "1-00:00:00", "--partition", "spot",
        "--constraint", "fast", "--name", "digits", "--setup", "export GREETING='hello world'", "--container", "env A=1",
        "--accelerate", "ddp", "--signal-s", "300", "--max-requeues", "3", "--max-crash-requeues", "1",
    ]  # fmt: skip
    dry = cluster.python("-m", "launcher", "slurm", *options, "--dry-run", "--", "train", "digits-resnet", cwd=cwd).stdout
    for line in ("--gpus-per-node=8", "--mem=64G", "--constraint=fast", "--time=1-00:00:00", "--signal=B:USR2@300"):
        assert f"#SBATCH {line}\n" in dry
    assert "export GREETING='hello world'\n" in dry
    assert "python=(env A=1 python)\n" in dry
