"""The host's memory: what control groups allow, and that the planner and `tltrain doctor` go by one answer."""

from __future__ import annotations

from collections import namedtuple

import psutil
import pytest
import torch

from tltrain.cache import planner
from tltrain.commands import doctor
from tltrain.core.flags import RunFlags
from tltrain.distributed import memory

GIB = 1024**3
Memory = namedtuple("Memory", "total available")


@pytest.mark.parametrize(("limits", "free", "total"), [([], 48, 64), ([32 * GIB, 9 * GIB], 9, 9), ([50 * GIB], 48, 50)])
def test_the_planner_and_doctor_go_by_one_answer(limits: list[int], free: int, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(64 * GIB, 48 * GIB))
    monkeypatch.setattr(memory, "_limits", lambda: limits)
    assert planner.find_budget(RunFlags(), torch.device("cpu"), 4).memory == free * GIB // 2 // 4
    found = next(finding for finding in doctor.memory() if finding.name == "memory")
    assert found.text.startswith(f"{free} of {total} GiB free")
    assert found.level == "ok"


def test_this_machine_has_memory() -> None:
    assert 0 < memory.free_memory() <= memory.total_memory() <= psutil.virtual_memory().total
