"""Host memory: what a step frees is kept for the next one, and returned behind the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tltrain.core.host import groups, memory

COUNT = """
import resource
import numpy as np
from tltrain.core.host.memory import keep_freed_memory, return_freed_memory

def faults(words):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(words)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

faults(12_000_000), faults(12_000_000)  # 96 MB
cleared = faults(12_000_000)
keep_freed_memory()
faults(12_000_000)
held = resident()
kept = faults(12_000_000)
return_freed_memory()
print(cleared, kept, held, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_a_freed_block_is_kept_for_the_next_step_and_returned_behind_the_run() -> None:
    """Else the kernel clears each page of it anew, in every step."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    cleared, kept, held, left = map(int, done.stdout.split())
    assert kept <= cleared // 4
    assert held - left > 10_000, "pages of 4 KiB"


def test_memory_is_at_most_the_limit_of_a_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of either version, the group's own or one's that it lies in."""
    monkeypatch.setattr(groups, "ALL", tmp_path)
    monkeypatch.setattr(groups, "OWN", tmp_path / "own")
    for line, file in (("0::/slice/job", "slice/memory.max"), ("7:memory:/slice/job", "memory/slice/job/memory.limit_in_bytes")):
        (tmp_path / "own").write_text(f"4:cpu,cpuacct:/x\n{line}\n")
        assert memory.total_memory() > 1000
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1000\n")
        assert (memory.total_memory(), memory.free_memory()) == (1000, 1000)
