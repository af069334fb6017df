"""`tltrain doctor` says what is missing, and what to do about it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tltrain.commands import doctor


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_healthy_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.doctor(["--folder", str(tmp_path / "runs")])
    said = capsys.readouterr().out
    for name in ("versions", "memory", "disk", "slurm", "wandb", "weights"):
        assert f"  {name}" in said
    assert "two processes work together by gloo" in said
    assert (code == 0) == ("This machine can train" in said)
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"


def test_two_processes_that_cannot_meet_are_a_problem(tmp_path: Path) -> None:
    fake(tmp_path, "python", "echo 'gloo: no route to host' >&2; exit 1")
    found = doctor.add_up("gloo", python=str(tmp_path / "python"))
    assert found.level == "problem"
    assert "no route to host" in found.text
    assert "GLOO_SOCKET_IFNAME" in found.remedy
    fake(tmp_path, "python", "exec sleep 60")
    assert "no answer within 1 s" in doctor.add_up("gloo", python=str(tmp_path / "python"), seconds=1).text


def test_little_room_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 64 * 1024**2))
    assert [(found.level, found.name) for found in doctor.disk(tmp_path)] == [("problem", "disk")]
    shared = [found for found in doctor.memory() if found.name == "/dev/shm"]
    assert [(found.level, "--shm-size" in found.remedy) for found in shared] == [("problem", True)]


def test_a_driver_without_a_matching_pytorch_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [found.level for found in doctor.gpus()] == ["note"]
    fake(tmp_path, "nvidia-smi", "echo 570.86")
    (found,) = doctor.gpus()
    assert found.level == "problem"
    assert "driver 570.86 is here" in found.text


def test_slurm_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fake(tmp_path, "sbatch", "echo slurm 24.05")
    fake(tmp_path, "sinfo", "exit 1")
    assert "does not answer" in doctor.slurm()[0].text
    fake(tmp_path, "sinfo", "echo 4 nodes, partitions gpu")
    assert doctor.slurm()[0].text == "slurm 24.05, 4 nodes, partitions gpu"
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    (found,) = doctor.wandb_key()
    assert found.level == "ok"
    assert "canary" not in found.text + found.remedy


def test_the_verdict_counts_gpus() -> None:
    gpu, cluster = doctor.Finding("ok", "gpu 0", "H100"), doctor.Finding("ok", "slurm", "x")
    assert doctor.verdict([]) == "This machine can train on its CPU: tltrain launch local"
    assert doctor.verdict([gpu]).startswith("This machine can train on one GPU")
    assert doctor.verdict([gpu, gpu, cluster]) == "This machine can train on 2 GPUs, and submit to a Slurm cluster: tltrain launch slurm"
