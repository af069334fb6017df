"""What the cluster's tests share: the cluster itself, small runs of the digits recipe, and how to look at them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slurm.cluster import Cluster, missing, running

RECIPE = str(Path(__file__).with_name("digits.yaml"))
ON_CPU = ("--gpus-per-node", "0", "--cpus", "1", "--time", "30")


@dataclass(frozen=True)
class Submitted:
    """A job of one run."""

    cluster: Cluster
    id: str
    run: Path

    @property
    def log(self) -> str:
        path = self.run / "jobs" / f"{self.id}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def outcome(self) -> dict[str, Any]:
        path = self.run / "outcome.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    @property
    def ends(self) -> list[dict[str, Any]]:
        """How each start of the job ended, as the launcher wrote it down."""
        path = self.run / "jobs" / self.id / "ends.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, text: str, seconds: float = 90, times: int = 1) -> None:
        """Wait until the job's log holds a text so many times."""
        try:
            self.cluster.wait_until(lambda: self.log.count(text) >= times, seconds, f"{text!r} in the log of job {self.id}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def wait(self, seconds: float = 180) -> dict[str, str]:
        return self.cluster.wait(self.id, seconds)

    def processes(self) -> list[int]:
        """The training processes of this job, by the numbers of the machine under the cluster; the lowest rank first."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue  # it has just ended
            if b"launcher.worker" in words and b"accelerate.commands" not in words and f"\0SLURM_JOB_ID={self.id}\0" in f"\0{environment}":
                rank = re.search(r"\0RANK=(\d+)", environment)
                found.append((int(rank[1]) if rank else 0, int(folder.name)))
        return [process for _, process in sorted(found)]


def launch(cluster: Cluster, cwd: Path, *options: str, recipe: str = RECIPE, words: tuple[str, ...] = (), **env: str) -> Submitted:
    """`tltrain launch slurm` of a small run."""
    command = ["-m", "launcher", "slurm", *ON_CPU, *options, "--", "train", recipe, *words]
    said = cluster.python(*command, cwd=cwd, check=True, **env).stdout
    found = re.search(r"job (\d+) submitted, run folder (.+?)(?:, waits for .*)?\n", said)
    assert found, said
    return Submitted(cluster, found[1], Path(found[2]))


def weights(run: Path) -> dict[str, bytes]:
    """Every file of weights that a run hands out."""
    files = [run / "weights.safetensors", *sorted((run / "stages").rglob("*.safetensors"))]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise the same weights, and the same figures."""
    ours, theirs = weights(one), weights(other)
    assert list(ours) == list(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    figures = [json.loads((run / "test_metrics.json").read_text()) for run in (one, other)]
    assert figures[0]["confusion"] == figures[1]["confusion"]
    assert figures[0]["loss"] == figures[1]["loss"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes. Skips, and says why, where there can be none."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("slurm"), 3) as up:
        yield up


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """The folder a user stands in."""
    os.makedirs(tmp_path / "work", exist_ok=True)
    return tmp_path / "work"
