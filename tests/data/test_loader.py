"""Loaders with real worker processes: the same batches, no inherited state, no deafness, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, open_images
from tltrain.data.loader import StepSampler, eval_loader, train_loader, train_positions
from tltrain.data.sampler import SampleStream, Shard
from tltrain.data.views import Preprocess, Views

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSplits:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    for c in "ab":
        (tmp_path / "d" / c).mkdir(parents=True)
        for i in range(12):
            pixels_HWC = np.random.default_rng(i + 100 * ord(c)).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels_HWC).save(tmp_path / "d" / c / f"{i}.png")
    return open_images(Data(source=f"folder:{tmp_path / 'd'}", val_fraction=0, test_fraction=0))


@pytest.mark.parametrize(("batch", "world", "num_micro"), [(10, 1, 1), (10, 3, 2), (2, 3, 1), (7, 2, 5), (30, 1, 1)])
@pytest.mark.parametrize("draw_weights", [None, (1.0,) * 11 + (30.0,)])
@pytest.mark.parametrize("views", [None, 1, 3])
def test_positions_without_images_are_those_of_the_items(
    batch: int, world: int, num_micro: int, draw_weights: tuple[float, ...] | None, views: int | None
) -> None:
    """Of each rank and micro-batch: who looks everything up trains on the same samples as who reads the images."""
    stream, labels = SampleStream(3, 1, 12, batch, views, 2, draw_weights), np.arange(12) * 5
    for shard in (Shard(rank, world, num_micro) for rank in range(world)):
        asked = list(StepSampler(stream, 1, 5, shard))
        found = list(train_positions(labels, stream, 1, 5, shard))
        assert len(found) == len(asked) == 4 * num_micro
        for items, batch_B in zip(asked, found, strict=True):
            assert batch_B["position"].tolist() == [item.position for item in items]
            assert batch_B["view"].tolist() == [item.view for item in items]
            assert batch_B["weight"].tolist() == [item.weight for item in items]
            assert batch_B["label"].tolist() == [5 * item.position for item in items]
            dtypes = [batch_B[name].dtype for name in ("position", "view", "label", "weight")]
            assert dtypes == [torch.int64, torch.int64, torch.int64, torch.float32]


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_0_and_2_workers_see_the_same(images: DataSplits, mixup: float) -> None:
    stream = SampleStream(0, 0, 24, 10, None, 0, mixup=mixup, cutmix=mixup, size=32)
    seen = []
    for workers in (0, 2):
        views = Views(images.train, Preprocess(32, 36), "strong", True, 0)
        seen.append(list(train_loader(views, stream, 1, 6, Shard(1, 2, 2), workers=workers, pin=False)))
    assert len(seen[0]) == len(seen[1]) == 10
    for alone, helped in zip(*seen, strict=True):
        assert alone.keys() == helped.keys()
        assert ("box" in alone) == (mixup > 0)
        for name in alone:
            assert torch.equal(alone[name], helped[name]), name
            assert alone[name].dtype == helped[name].dtype


def test_a_resumed_loader_goes_on_where_it_was(images: DataSplits) -> None:
    views, stream = Views(images.train, Preprocess(32, 36), "light", True, 0), SampleStream(0, 0, 24, 10, None, 0)
    whole = list(train_loader(views, stream, 0, 6, Shard(), 0, False))
    late = list(train_loader(views, stream, 4, 6, Shard(), 0, False))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(whole[4:], late, strict=True))


def test_evaluation_over_ranks_is_exact(images: DataSplits) -> None:
    views = Views(images.train, Preprocess(32, 36), "strong", True, 0)
    seen, lengths = [], []
    for rank in range(5):
        batches = list(eval_loader(views, Shard(rank, 5), 3, None, 0, False))
        lengths.append(len(batches))
        seen += [int(i) for batch in batches for i in batch["position"][batch["weight"] == 1]]
    assert sorted(seen) == list(range(24))
    assert set(lengths) == {2}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_stops_with_its_path_and_no_trace(images: DataSplits, tmp_path: Path, workers: int) -> None:
    (tmp_path / "d" / "b" / "3.png").unlink()
    views = Views(images.train, Preprocess(32, 36), "light", True, 0)
    with pytest.raises(UserError) as caught:
        list(eval_loader(views, Shard(), 4, None, workers, False))
    assert str(caught.value).startswith(str(tmp_path / "d" / "b" / "3.png"))
    assert "Traceback" not in str(caught.value)


PARENT = """
import os, signal, sys, time
import torch
from tltrain.data import open_images
from tltrain.data.loader import train_loader
from tltrain.data.sampler import SampleStream, Shard
from tltrain.data.views import Preprocess, Views
from tltrain.core.recipe import Data

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: print("parent heard", flush=True))
    signal.signal(signal.SIGUSR2, lambda *_: print("parent heard", flush=True))
    images = open_images(Data(source="digits"))
    views, stream = Views(images.train, Preprocess(32, 32), "light", False, 0), SampleStream(0, 0, len(images.train), 16, None, 0)
    batches = iter(train_loader(views, stream, 0, 40, Shard(), 2, False))
    next(batches)
    print("ready", flush=True)
    if "crash" in sys.argv:
        raise RuntimeError("with workers at work")
    sys.stdin.readline()
    print(1 + sum(1 for _ in batches), "batches", flush=True)
    sys.stdin.readline()
    batches = iter(train_loader(views, stream, 0, 40, Shard(), 2, False))
    next(batches)
    print("again", flush=True)
    time.sleep(60)
"""


NEIGHBOUR = """
import multiprocessing, signal
from tltrain.data import open_images
from tltrain.data.loader import eval_loader
from tltrain.data.sampler import Shard
from tltrain.data.views import Preprocess, Views
from tltrain.core.recipe import Data

def blocked(say):
    say.send(sorted(number.name for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())))

if __name__ == "__main__":
    images = open_images(Data(source="digits", per_class=2))
    assert len(list(eval_loader(Views(images.train, Preprocess(32, 32), "none", False, 0), Shard(), 16, None, 1, False))) == 2
    hear, say = multiprocessing.Pipe(False)
    process = multiprocessing.get_context("forkserver").Process(target=blocked, args=(say,))
    process.start()
    print(hear.recv())
    process.join()
"""


def test_other_processes_of_the_user_hear_ctrl_c(tmp_path: Path) -> None:
    """Python has one fork server a process: in a notebook that has trained, what others fork from it is not deaf."""
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "neighbour.py")], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr


UNGUARDED = """
import sys
from dataclasses import replace
from tltrain.data import open_images
from tltrain.data.loader import eval_loader
from tltrain.data.sampler import Shard
from tltrain.data.views import Preprocess, Views
from tltrain.core.recipe import Data

print("runs", flush=True)

class Read:
    def __init__(self, read):
        self.read = read
    def __call__(self, number):
        return self.read(number)

if __name__ == "__main__" or "own" not in sys.argv:
    split = open_images(Data(source="digits", per_class=2)).train
    if "own" in sys.argv:
        split = replace(split, read=Read(split.read))
    print(len(list(eval_loader(Views(split, Preprocess(32, 32), "none", False, 0), Shard(), 16, None, 1, False))), flush=True)
"""


@pytest.mark.parametrize("words", [[], pytest.param(["own"], marks=pytest.mark.slow)])
def test_a_worker_runs_the_users_script_only_where_it_needs_it(words: list[str], tmp_path: Path) -> None:
    """A script without `if __name__ == "__main__"` trains; what a class of its own reads is read by workers too."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "script.py"), *words]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280)
    assert done.stdout.split() == (["runs", "runs", "2"] if words else ["runs", "2"]), done.stderr


def _descendants(pid: int) -> list[int]:
    children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [grandchild for child in children for grandchild in _descendants(child)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_ignore_signals_inherit_nothing_and_die_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=tmp_path
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    processes: list[int] = []
    try:
        assert parent.stdout.readline() == "ready\n"
        processes = [pid for pid in _descendants(parent.pid) if "resource_tracker" not in _command(pid)]
        assert len(processes) == 3  # the server and two workers
        for pid in processes:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                os.kill(pid, number)
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "40 batches\n"  # and nobody below heard with the parent's ears
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "again\n"
        processes = _descendants(parent.pid)
        assert len(processes) >= 3
        parent.kill()
        deadline = time.monotonic() + 10
        while any(_alive(pid) for pid in processes):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.05)
    finally:
        for pid in filter(_alive, processes):  # orphans would hold the pipe open
            os.kill(pid, signal.SIGKILL)
        parent.kill()
        parent.communicate()


@pytest.mark.slow
def test_a_crash_does_not_wait_for_workers(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "parent.py"), "crash"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "RuntimeError: with workers at work" in done.stderr


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
