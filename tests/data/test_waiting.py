"""Data workers that are lost, that have no shared memory, or that send nothing: the wait ends, with a word."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from tltrain.core.errors import UserError
from tltrain.data import workers
from tltrain.data.workers import Loader, fitting, heard_while_waiting, shared_batch, worker_options


class Slow(Dataset[dict[str, torch.Tensor]]):
    """Batches of its worker's number; one that is asked for a negative position sleeps."""

    def __getitems__(self, items: list[int]) -> dict[str, torch.Tensor]:
        if items[0] < 0:
            time.sleep(3600)
        return {"pid": torch.tensor([os.getpid()] * len(items)), "image": torch.from_numpy(np.zeros((len(items), 3, 8, 8), np.uint8))}

    def __len__(self) -> int:
        return 8


def loader(batches: list[list[int]]) -> Loader:
    return Loader(Slow(), batch_sampler=batches, collate_fn=shared_batch, **worker_options(1))


def test_a_batch_comes_in_shared_memory() -> None:
    assert [batch["image"].is_shared() for batch in loader([[0], [1, 2]])] == [True, True]


def test_a_killed_worker_is_said_with_the_way_on() -> None:
    batches = iter(loader([[0], [-1], [1], [2], [3]]))
    os.kill(int(next(batches)["pid"][0]), signal.SIGKILL)
    with pytest.raises(UserError, match=r"data worker has ended.*was killed by SIGKILL.*no memory left.*same command goes on.*--workers 0"):
        list(batches)


def test_a_wait_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WAIT_S", 2.0)
    with pytest.raises(UserError, match="sends nothing any more"):
        list(loader([[-1]]))


def test_a_stop_is_heard_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STOPPING_S", 2.0)
    with heard_while_waiting(lambda: True), pytest.raises(UserError, match="sends nothing any more"):
        list(loader([[-1]]))
    monkeypatch.setattr(workers, "STOPPING_S", 240.0)  # a busy machine starts a worker in half a minute
    with heard_while_waiting(lambda: True):
        assert len(list(loader([[0], [1]]))) == 2, "what comes is given all the same"


@pytest.mark.parametrize(("free", "fit"), [(0, 0), (5_999, 0), (6_000, 1), (18_000, 3), (10**9, 4)])
def test_only_as_many_workers_as_have_room(
    free: int, fit: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))
    monkeypatch.setattr(workers, "_printed", set())
    assert [fitting(4, 1_000), fitting(4, 1_000)] == [fit, fit]
    said = capsys.readouterr().err
    assert said.count("--shm-size") == (fit < 4)


DISK_MB = 1


def test_shared_memory_that_is_full_is_an_error_of_the_batch(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")
    assert "--shm-size" in str(workers._lost(error, 2))
    assert workers._lost(RuntimeError("some bug"), 2) is None
    monkeypatch.setattr(workers, "SHARED_MEMORY", disk)
    assert fitting(2, 10 * 2**20) == 0
