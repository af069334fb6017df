"""The commands that count and time the loop: memory by cut, bytes over the wire, layouts, determinism, one GPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from benchmarks import determinism, gpu, layouts, memory, traffic


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
def test_the_command_for_a_gpu_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part of it, with tiny nets: loops that learn the same, the store, memory, syncs, and all of it as JSON."""
    gpu.main(["--dry-run", "--json", str(tmp_path / "gpu.json")])
    said = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert {row["loop"] for row in said["speeds"]} >= {"tltrain", "bare PyTorch", "transformers' Trainer"}
    assert all(row["images_per_s"] > 0 and row["fraction"] > 0 for row in said["speeds"])
    assert said["head_stage_s"] > 0
    assert {row["net"] for row in said["memory"]} == {"resnet-micro", "vit-tiny"}
    assert "host waited for the device 0 times" in capsys.readouterr().out


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
