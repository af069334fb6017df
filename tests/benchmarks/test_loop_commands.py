"""The commands that count and time the loop: memory by cut, bytes over the wire, layouts, determinism, one GPU."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import determinism, gpu, gpu_speeds, layouts, memory, traffic
from benchmarks.gpu_turns import Failed, Feed, Racer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["resnet-micro", "vit-tiny"])
def test_memory_falls_with_the_cut(name: str) -> None:
    """Bytes that autograd keeps, counted, from the head alone to the whole net; and recompute keeps less, the more blocks train."""
    rows = list(memory.by_cut(name, 32, 2, torch.device("cpu")))
    assert (rows[0].cut, rows[-1].cut) == ("head", "all")
    kept = [row.kept for row in rows]
    assert all(a < b for a, b in itertools.pairwise(kept)), kept
    assert kept[0] < kept[-1] / 50
    assert rows[-1].recomputed < 0.8 * rows[-1].kept  # the first of a small net's few blocks is a large part of it
    assert memory.show(rows, "2 images").count("\n") == len(rows) + 1


@pytest.mark.parametrize(("net", "num"), [("resnet-micro", 2), ("vit-tiny", 2), pytest.param("resnet-micro", 3, marks=pytest.mark.slow)])
def test_a_step_reduces_four_bytes_for_each_parameter_that_trains(net: str, num: int, tmp_path: Path) -> None:
    """At every stage, with accumulation; what the warm-up and BatchNorm's statistics send is counted apart."""
    rows = traffic.measure(net, num, tmp_path)
    assert [row.stage for row in rows] == ["head", "mid", "all"]
    assert rows[0].trained < rows[1].trained < rows[2].trained
    for row in rows:
        assert len(row.per_step) == 4
        assert row.per_step == pytest.approx([4 * row.trained] * 4, rel=0.01)
        assert row.warm_up == pytest.approx(4 * row.trained, rel=0.01)
        assert all(sent > 0 for sent in row.statistics) == (net.startswith("resnet") and row.stage == "all")


@pytest.mark.slow
def test_the_command_for_a_gpu_runs_dry(tmp_path: Path) -> None:
    """Every part of it, with tiny nets: each row stands in the file, and all loops that are installed learn the same."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--dry-run",
        "--also",
        ",".join(gpu_speeds.ALSO),
        "--json",
        str(tmp_path / "gpu.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert said["failed"] == said["left_out"] == []
    assert "errors" not in said
    loops = {"tltrain", "tltrain --compile", "bare PyTorch", "bare PyTorch, compiled", "transformers' Trainer"}
    loops |= {f"tltrain, {name}" for name in gpu_speeds.ALSO}
    absent = {row["package"] for row in said.get("absent", [])}
    loops |= {name for package, name in (("timm", "timm"), ("lightning", "Lightning")) if package not in absent}
    for net in ("resnet-micro", "vit-tiny"):
        rows = [row for row in said["speeds"] if row["net"] == net]
        assert {row["loop"] for row in rows} == loops
        assert all(row["images_per_s"] > 0 and row["fraction"] > 0 and len(row["laps"]) == 2 and not row["differs"] for row in rows)
        assert {row["loop"] for row in said["start"] if row["net"] == net} == loops
    assert all(row["waits"] == 0 for row in said["host_waits"])
    assert len(said["host_waits"]) == 2 * (2 + len(gpu_speeds.ALSO))
    assert [row["cold_s"] > 0 for row in said["compile"]] == [True, True]
    assert said["head"][0]["fill_s"] > 0
    assert said["head"][0]["behind_s"] > 0
    assert [row["how"] for row in said["suffix"]] == 2 * ["from the store", "frozen blocks in each step"]
    assert [row["how"] for row in said["distill"]] == ["stored", "in the loop"]
    assert said["distill"][0]["loss"] == said["distill"][1]["loss"]
    assert len(said["files"]) >= 3
    assert all(row["images_per_s"] > 0 for row in said["files"])
    assert {row["net"] for row in said["memory"]} == {"resnet-micro", "vit-tiny"}


def test_what_does_not_fit_into_the_seconds_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--dry-run", "--parts", "head,files", "--budget-s", "0", "--json", str(tmp_path / "gpu.json")])
    said = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert said["left_out"] == ["head", "files"]
    assert "head" not in said
    assert "head: left out" in capsys.readouterr().out


def test_loops_in_turns_stand_still_while_others_run() -> None:
    """Each lap is so many batches of one loop, warm-up included; an error in a loop comes out where its lap was asked for."""
    seen: list[tuple[str, int]] = []

    def loop(name: str, feed: Feed) -> None:
        for step, _ in enumerate(feed):
            if name == "c" and step == 4:
                raise ValueError("planted")
            seen.append((name, step))

    batch = (torch.zeros(1), torch.zeros(1))
    a, b, c = (Racer(name, partial(loop, name), [batch]) for name in "abc")
    try:
        for racer in (a, b, c):
            racer.warm_up(3)
        for racer in (a, b, b, a):
            racer.lap(2)
        with pytest.raises(Failed, match="ValueError: planted"):
            c.lap(2)
    finally:
        for racer in (a, b, c):
            racer.close()
    order = [("a", 0, 3), ("b", 0, 3), ("c", 0, 3), ("a", 3, 5), ("b", 3, 5), ("b", 5, 7), ("a", 5, 7), ("c", 3, 4)]
    assert seen == [(name, step) for name, first, stop in order for step in range(first, stop)]
    assert (len(a.laps), len(b.laps), len(c.laps)) == (2, 2, 0)
    assert not a.thread.is_alive()
    assert not b.thread.is_alive()


@pytest.mark.slow
def test_the_commands_of_layouts_and_determinism_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row.name for row in layouts.main(["--smoke"])[0].rows] == ["contiguous", "channels last"]
    before = torch.are_deterministic_algorithms_enabled()
    try:
        (result,) = determinism.main(["--smoke", "--nets", "resnet-micro"])
    finally:
        torch.use_deterministic_algorithms(before)  # a run in this process sets it
    assert [row.name for row in result.rows] == ["deterministic: true", "deterministic: false"]
    assert "two runs end at equal bits with deterministic: true" in capsys.readouterr().out
