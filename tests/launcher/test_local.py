"""`tltrain launch local`: signals reach the processes that train, and processes on the CPU form one world."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launcher import accelerate as processes
from launcher.accelerate import World
from launcher.local import capability, local_world, main
from tltrain.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# A parent that ignores nothing itself, like accelerate launch with one process, and a child that trains: it saves when it is told.
CHILD = """\
import signal, sys, time
from pathlib import Path
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
heard = []
for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda n, f: heard.append(signal.Signals(n).name))
Path("ready").touch()
while not heard or heard == ["SIGINT"] and Path("stubborn").exists():
    time.sleep(0.01)
time.sleep(0.5)
Path("saved").write_text(" ".join(heard))
"""
PARENT = "import subprocess, sys; sys.exit(subprocess.Popen([sys.executable, 'child.py']).wait())"
SUPERVISOR = """\
import sys
from launcher.supervise import supervise
end = supervise([sys.executable, "-c", sys.argv[1]], {}, (lambda block: None) if sys.argv[2] == "piped" else None)
print(end.code, *end.signals)
"""


@pytest.fixture
def supervised(tmp_path: Path, request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, "-c", SUPERVISOR, PARENT, getattr(request, "param", "plain")]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    return process


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("supervised", ["plain", "piped"], indirect=True)
@pytest.mark.parametrize(("sent", "heard"), [("SIGUSR2", "SIGUSR2"), ("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM")])
def test_a_signal_reaches_the_child_once_and_its_save_is_waited_for(
    supervised: subprocess.Popen[str], tmp_path: Path, sent: str, heard: str
) -> None:
    wait_for(tmp_path / "ready")
    supervised.send_signal(signal.Signals[sent])
    said, _ = supervised.communicate(timeout=60)
    assert said.split() == ["0", sent]
    assert (tmp_path / "saved").read_text() == heard


def test_a_second_interrupt_ends_everything_at_once(supervised: subprocess.Popen[str], tmp_path: Path) -> None:
    (tmp_path / "stubborn").touch()
    wait_for(tmp_path / "ready")
    supervised.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert supervised.poll() is None
    supervised.send_signal(signal.SIGINT)
    said, _ = supervised.communicate(timeout=60)
    assert said.split() == ["-9", "SIGINT", "SIGINT"]
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("gpus", "accelerate", "asked", "world", "config"),
    [
        (0, None, None, (1, False), "cpu"),
        (0, None, 3, (3, False), "cpu"),
        (8, None, None, (8, True), "ddp"),
        (8, None, 2, (2, True), "ddp"),
        (1, None, None, (1, True), "one_gpu"),
        (8, "one_gpu", None, (1, True), "one_gpu"),
        (8, "fsdp2", None, (8, True), "fsdp2"),
        (8, "cpu", None, (1, False), "cpu"),
    ],
)
def test_how_many_processes_and_how_they_are_spread(
    gpus: int, accelerate: str | None, asked: int | None, world: tuple[int, bool], config: str
) -> None:
    found = local_world(gpus, accelerate, asked)
    assert (found.num_processes, found.gpus) == world
    assert processes.config_file(accelerate, found).stem == config


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="this machine has 2 GPUs"):
        local_world(2, None, 3)
    with pytest.raises(UserError, match="choose ddp"):
        local_world(2, "one_gpu", 2)
    with pytest.raises(UserError, match="there are cpu, ddp"):
        processes.config_file("dpp", World(1, 1, False, 1))


def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert processes.local_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes.local_gpus() == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: x)'\necho '  MIG 1g'\necho 'GPU 1: H100 (UUID: y)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert processes.local_gpus() == 2


def test_a_dry_run_prints_the_command_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--accelerate", "cpu", "--processes", "2", "--dry-run", "--", "train", "digits-resnet", "--purpose", "a b"]) == 0
    said = capsys.readouterr().out
    assert "accelerate.commands.launch --quiet --config_file" in said
    assert "--multi_gpu" in said
    assert "ACCELERATE_USE_CPU=true" in said
    assert said.endswith("-m launcher.worker train digits-resnet --purpose 'a b'\n")
    assert said.startswith("# launch  2 processes on the CPU, fp32: as cpu.yaml says\nenv ")
    assert list(tmp_path.iterdir()) == []


def test_every_shipped_configuration_of_a_gpu_says_bf16() -> None:
    folder = processes.config_file("ddp", World(1, 2, True, 1)).parent
    said = {path.stem: yaml.safe_load(path.read_text())["mixed_precision"] for path in folder.glob("*.yaml")}
    assert said.pop("cpu") == "no"
    assert len(said) >= 5
    assert set(said.values()) == {"bf16"}


@pytest.mark.parametrize(
    ("answer", "words", "line"),
    [
        ("9.0\n9.0\n", [], "2 processes on GPU, bf16: as ddp.yaml says, which compute capability 9.0 has"),
        ("8.0\n7.5\n", [], "2 processes on GPU, fp16: ddp.yaml says bf16, which a GPU of compute capability 7.5 lacks"),
        ("[N/A]\n", [], "2 processes on GPU, bf16: as ddp.yaml says"),
        (
            "7.0\n",
            ["--accelerate", "one_gpu"],
            "1 process on GPU, fp16: one_gpu.yaml says bf16, which a GPU of compute capability 7.0 lacks",
        ),
        ("7.0\n", ["--accelerate", "own.yaml"], "2 processes on GPU, fp32: as own.yaml says"),
        ("7.0\n", ["--accelerate", "cpu"], "1 process on the CPU, fp32: as cpu.yaml says"),
    ],
)
def test_the_precision_is_what_the_gpu_has(
    answer: str, words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """bf16 where every GPU has it, else fp16; a configuration of one's own is followed to the letter."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\n[ \"$2\" = --query-gpu=compute_cap ] || exit 2\nprintf '{answer}'\n".replace("\n'", "\\n'"))
    fake.chmod(0o755)
    (tmp_path / "own.yaml").write_text("distributed_type: MULTI_GPU\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--dry-run", "--", "train", "digits-resnet"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"# launch  {line}\nenv ")
    assert ("--mixed_precision fp16" in said) == ("fp16" in line)
    monkeypatch.setenv("PATH", "/nowhere")
    assert capability() is None


def test_who_is_killed_leaves_no_word(tmp_path: Path) -> None:
    assert "left no note of a failure: killed from outside" in processes.explain(1, tmp_path)
    (tmp_path / "rank-3.failed.json").write_text(json.dumps({"host": "elsewhere"}))
    assert "left no note" in processes.explain(1, tmp_path)
    (tmp_path / "rank-1.failed.json").write_text(json.dumps({"host": socket.gethostname()}))
    assert processes.explain(1, tmp_path) == "processes ended with code 1"


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_two_processes_stop_with_a_save_and_go_on(tmp_path: Path, number: str) -> None:
    recipe = str(ROOT / "tests" / "slurm" / "digits.yaml")
    command = [sys.executable, "-m", "launcher", "local", "--accelerate", "cpu", "--processes", "2", "--", "train", recipe]
    command += ["--stages.1.epochs", "60"]
    with (tmp_path / "log").open("w") as log:
        environment = {**ENVIRONMENT, "WANDB_API_KEY": "canary0123456789"}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    end = time.monotonic() + 120
    while "all  epoch   5" not in (tmp_path / "log").read_text():
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.1)
    process.send_signal(signal.Signals[number])
    assert process.wait(60) == 75, (tmp_path / "log").read_text()
    run = tmp_path / "runs" / "lab"
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["signal"]) == ("stopped", number)
    assert json.loads((run / "env.json").read_text())["accelerate"]["processes"] == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resume  from stage all" in done.stdout


def test_a_driver_that_hangs_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "ANSWER_S", 0.3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError, match="nvidia-smi has not answered"):
        processes.local_gpus()
