"""Cores are those that this process may use, not those of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tltrain.core.host import cores, groups
from tltrain.data import workers


def of_groups(monkeypatch: pytest.MonkeyPatch, folder: Path, limits: dict[str, str]) -> None:
    """Control groups as the kernel shows them, with the content of some groups' cpu.max."""
    for group, limit in limits.items():
        (folder / group).mkdir(parents=True, exist_ok=True)
        (folder / group / "cpu.max").write_text(limit + "\n")
    monkeypatch.setattr(groups, "ALL", folder)
    monkeypatch.setattr(groups, "OWN", folder / "own")
    (folder / "own").write_text("1:name=systemd:/x\n0::/slice/job\n")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are handed out on Linux")
def test_they_follow_the_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of_groups(monkeypatch, tmp_path, {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)))
    assert cores.num_cores() == 5


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"slice/job": "150000 100000"}, 2),
        ({"slice/job": "max 100000", "slice": "300000 100000"}, 3),
        ({"slice/job": "50000 100000"}, 1),
        ({"slice/job": "6400000 100000"}, 40),
        ({"elsewhere": "100000 100000"}, 40),
        ({"slice/job": "?"}, 40),
    ],
)
def test_they_follow_the_quota_of_a_container(
    limits: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_groups(monkeypatch, tmp_path, limits)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(40)), raising=False)
    assert cores.num_cores() == expected


@pytest.mark.parametrize(
    ("group", "quota", "expected"),
    [("docker/1", 150_000, 2), ("docker/1", -1, 40), ("docker", 300_000, 3), ("", 300_000, 3), ("x", 100_000, 40)],
)
def test_they_follow_the_quota_of_the_first_version_of_groups(
    group: str, quota: int, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A container sees its own group at the top of the tree, under the path that the host gave it."""
    of_groups(monkeypatch, tmp_path, {})
    (tmp_path / "own").write_text("4:cpu,cpuacct:/docker/1\n3:cpuset:/docker/1\n0::/\n")
    folder = tmp_path / "cpu,cpuacct" / group
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(40)), raising=False)
    assert cores.num_cores() == expected


@pytest.mark.parametrize(("num_cores", "local_world", "expected"), [(1, 1, 1), (8, 1, 8), (128, 8, 16), (128, 1, 16), (4, 8, 1)])
def test_data_workers_are_a_process_share_of_them(num_cores: int, local_world: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "num_cores", lambda: num_cores)
    assert workers.default_workers(local_world) == expected
