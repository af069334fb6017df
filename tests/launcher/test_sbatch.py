"""slurm/*.sbatch without Slurm: srun and scontrol are stand-ins that write down how they were called."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))

# Like srun: passes on what it is told, and ends with 1 whatever the processes ended with. FAKE says how they end.
SRUN = f"""\
#!{sys.executable}
import json, os, signal, sys, time
from pathlib import Path
here = Path(os.environ["FAKE_HOME"])
with (here / "srun.calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
run = Path(sys.argv[sys.argv.index("--notes") + 1]).parents[1]
start = 1 + len(list((run / "generations").iterdir()))
(run / "generations" / f"{{start:06d}}").touch()
def end(outcome, **details):
    (run / "outcome.json").write_text(json.dumps({{"outcome": outcome, "generation": start, **details}}))
    sys.exit(1)
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda n, f: (time.sleep(0.5), end("stopped", signal=signal.Signals(n).name)))
how = os.environ["FAKE"]
(here / "started").touch()
if how == "waits":
    time.sleep(20)
if how != "silent":
    end(how)
sys.exit(1)
"""


class Batch:
    """One run of a script as Slurm would start it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        tools = home / "bin"
        tools.mkdir()
        for name, text in {
            "srun": SRUN,
            "scontrol": '#!/bin/sh\necho "$*" >> "$FAKE_HOME/scontrol.calls"\n[ "$1" != show ] || echo n1\n',
            "sbatch": '#!/bin/sh\nprintf "%s\\n" "$@" > "$FAKE_HOME/sbatch.call"\n',
            "squeue": "#!/bin/sh\necho 1:00:00\n",
        }.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NAME": "t"}
        slurm |= {"SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_PARTITION": "p"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TLTRAIN_"))}
        self.environment = {**kept, **slurm, "PATH": f"{tools}:{kept['PATH']}", "PYTHONPATH": str(ROOT), "FAKE_HOME": str(home)}
        self.environment["TLTRAIN_PYTHON"] = sys.executable

    def start(self, how: str, *words: str, script: str = "train.sbatch", **environment: str) -> subprocess.Popen[str]:
        command = ["bash", str(ROOT / "slurm" / script), *words]
        env = {**self.environment, "FAKE": how, **environment}
        return subprocess.Popen(command, cwd=self.home, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, how: str, *words: str, script: str = "train.sbatch", **environment: str) -> tuple[int, str]:
        process = self.start(how, *words, script=script, **environment)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    def calls(self, tool: str) -> list[str]:
        path = self.home / f"{tool}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def requeues(self) -> int:
        return sum(call.startswith("requeue") for call in self.calls("scontrol"))

    def wait_started(self) -> None:
        end = time.monotonic() + 120
        while not (self.home / "started").exists():
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture
def job(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


def test_one_task_a_node_calls_the_launcher(job: Batch) -> None:
    code, said = job.run("finished", "digits-resnet", "--purpose", "a 'b' $c")
    assert code == 0, said
    (call,) = job.calls("srun")
    for word in (
        '"--nodes=2"',
        '"--ntasks-per-node=1"',
        '"--kill-on-bad-exit=1"',
        '"--cpus-per-task=3"',
        '"launcher.node"',
        '"20042"',
        '"n1"',
    ):
        assert word in call
    assert call.endswith('"--", "train", "digits-resnet", "--purpose", "a \'b\' $c"]')
    assert job.requeues() == 0


def test_a_preemption_is_passed_on_and_requeued_once_at_the_very_end(job: Batch) -> None:
    process = job.start("waits", "digits-resnet")
    job.wait_started()
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR2)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1, "were it not requeued, this must not look like success"
    assert job.calls("scontrol") == ["show hostnames n[1-2]", "--oneliner show job 42", "requeue 42"]
    assert said.rstrip().endswith("launch  requeue: preempted")


def test_sigterm_saves_and_requeues_nothing(job: Batch) -> None:
    process = job.start("waits", "digits-resnet")
    job.wait_started()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert job.requeues() == 0
    assert "launch  stopped" in said


@pytest.mark.parametrize(
    ("how", "crash_requeues", "code", "requeues"),
    [("failed", "0", 1, 0), ("failed", "1", 1, 1), ("silent", "0", 1, 0), ("finished", "1", 0, 0)],
)
def test_how_the_processes_end_decides(job: Batch, how: str, crash_requeues: str, code: int, requeues: int) -> None:
    assert job.run(how, "digits-resnet", TLTRAIN_MAX_CRASH_REQUEUES=crash_requeues)[0] == code
    assert job.requeues() == requeues


def test_requeues_have_an_end(job: Batch) -> None:
    for _ in range(3):
        (job.home / "started").unlink(missing_ok=True)
        process = job.start("waits", "digits-resnet", TLTRAIN_MAX_REQUEUES="2")
        job.wait_started()
        process.send_signal(signal.SIGUSR2)
        said, _ = process.communicate(timeout=30)
    assert job.requeues() == 2
    assert "max_requeues is 2" in said


def test_a_mistake_in_the_words_starts_nothing(job: Batch) -> None:
    assert job.run("finished", "digits-resnet", "--batch", "0")[0] == 2
    assert job.run("finished")[0] == 2
    assert job.calls("srun") == []
    assert job.requeues() == 0


def test_an_array_gives_each_task_its_value_and_folder(job: Batch) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1"}
    words = ("seed", "3", "7", "--", "digits-resnet", "--keep", "1")
    assert job.run("finished", *words, script="array.sbatch", **array)[0] == 0
    assert job.calls("srun")[0].endswith('"train", "digits-resnet", "--keep", "1", "--seed", "7", "--folder", "runs/by-seed/7"]')
    assert (job.home / "runs" / "by-seed" / "7" / "jobs" / "40_1").is_dir()
    assert job.run("finished", *words, script="array.sbatch", **{**array, "SLURM_ARRAY_TASK_ID": "2"})[0] == 2


def test_a_chain_submits_the_student_once(job: Batch) -> None:
    words = ("digits-vit", "--", "digits-distill", "--purpose", "a b")
    assert job.run("finished", *words, script="chain.sbatch")[0] == 0
    call = (job.home / "sbatch.call").read_text().splitlines()
    assert call[:2] == ["--dependency=afterok:42", "--kill-on-invalid-dep=yes"]
    assert call[-4:] == [str(ROOT / "slurm" / "train.sbatch"), "digits-distill", "--purpose", "a b"]
    assert '"train", "digits-vit"]' in job.calls("srun")[0]
    (job.home / "sbatch.call").unlink()
    assert job.run("finished", *words, script="chain.sbatch", SLURM_RESTART_COUNT="1")[0] == 0
    assert not (job.home / "sbatch.call").exists()


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_shellcheck_and_the_header(template: Path) -> None:
    text = template.read_text()
    for directive in ("--signal=B:USR2@", "--open-mode=append", "--requeue", "--nodes=1", "--ntasks-per-node=1"):
        assert f"#SBATCH {directive}" in text
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(template)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
