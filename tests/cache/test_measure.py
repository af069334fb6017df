"""What the plan times: the network's own cost and the images', not the other load of a busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from conftest import made_recipe

from tltrain.cache import image_cache, measure
from tltrain.cache.frozen import FrozenModel
from tltrain.cache.measure import time_frozen
from tltrain.data import Split
from tltrain.data.views import Preprocess
from tltrain.models import factory

CPU = torch.device("cpu")


@pytest.fixture
def frozen() -> FrozenModel:
    chain = factory.skeleton(made_recipe().backbone, 10, 32, 32).chain
    return FrozenModel(measure.timed(chain, CPU), 4, None, 32, nullcontext)


def wait_s(seconds: float) -> None:
    time.sleep(seconds)


def spin_s(seconds: float) -> None:
    """Take CPU time, as threads do that wait for each other."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def slowed(frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch, how: Callable[[float], None], delays_s: Iterator[float]) -> None:
    forward = type(frozen.chain).forward

    def late(self: Any, *arguments: Any, **named: Any) -> Any:
        how(next(delays_s))
        return forward(self, *arguments, **named)

    monkeypatch.setattr(type(frozen.chain), "forward", late)


def ever(value: float) -> Iterator[float]:
    while True:
        yield value


def every_third(value: float) -> Iterator[float]:
    while True:
        yield from (value, 0.0, 0.0)


@pytest.mark.parametrize(
    ("how", "delays_s"),
    [(wait_s, ever(0.2)), (spin_s, every_third(0.4)), (spin_s, ever(0.25))],
    ids=["others compute all the time", "a pass now and then", "every pass"],
)
def test_a_busy_machine_is_not_taken_for_the_networks_cost(
    how: Callable[[float], None], delays_s: Iterator[float], frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed_s, row_bytes = time_frozen(frozen, 32, CPU)
    assert undisturbed_s > 0
    assert row_bytes > 0
    slowed(frozen, monkeypatch, how, delays_s)
    seconds, same = time_frozen(frozen, 32, CPU)
    assert same == row_bytes
    assert seconds < 0.1, "this network has a few million operations: no machine takes as long"


def test_threads_that_spin_are_asked_one_by_one(frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow with several threads alone: the time of one thread is an upper bound."""
    before, forward = torch.get_num_threads(), type(frozen.chain).forward
    monkeypatch.setattr(measure, "SLOWEST_OPERATIONS_S", 1.0)  # the operations alone would bound it

    def spinning(self: Any, *arguments: Any, **named: Any) -> Any:
        spin_s(0.3 if torch.get_num_threads() > 1 else 0.0)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(type(frozen.chain), "forward", spinning)
    torch.set_num_threads(2)
    try:
        assert time_frozen(frozen, 32, CPU)[0] < 0.2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_waiting_now_and_then_is_not_the_images_cost() -> None:
    reads: list[int] = []

    def read(i: int) -> Any:
        from PIL import Image

        reads.append(i)
        time.sleep(0.3 if len(reads) % 4 == 0 else 0.0)
        return Image.new("RGB", (40, 40))

    split = Split("train", np.zeros(100, np.int64), tuple(map(str, range(100))), np.arange(100), read)
    found = image_cache.estimate(split, Preprocess(32, 32), num=12)
    assert len(reads) == 12
    assert found.seconds < 100 * 0.05, "three of twelve waited for 0.3 s"


def test_a_slow_disk_is_the_images_cost() -> None:
    def read(i: int) -> Any:
        from PIL import Image

        time.sleep(0.05)
        return Image.new("RGB", (40, 40))

    split = Split("train", np.zeros(100, np.int64), tuple(map(str, range(100))), np.arange(100), read)
    assert image_cache.estimate(split, Preprocess(32, 32), num=4).seconds > 100 * 0.04
