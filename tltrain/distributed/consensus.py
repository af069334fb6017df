"""What one rank alone knows, summed over all, so that nobody acts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tltrain.distributed.runtime import Runtime


class FlagAllReduce:
    """What one rank alone knows (a signal, a timer, a loss that is not finite), summed over all ranks, so that nobody acts alone.

    It goes through a side group on the host: no device is waited for. Facts are small non-negative integers.
    """

    def __init__(self, runtime: Runtime, num_facts: int) -> None:
        self.group = runtime.side
        self.pending: tuple[Tensor | list[int], Any] = ([0] * num_facts, None)

    def swap(self, facts: Sequence[int]) -> list[int]:
        """Post this step's facts and return the sums of those posted a step ago."""
        sums = self._wait()
        self._post(facts)
        return sums

    def now(self, facts: Sequence[int]) -> list[int]:
        """The sums of everybody's facts at this moment, with those still under way."""
        before = self._wait()
        self._post(facts)
        return [a + b for a, b in zip(before, self._wait(), strict=True)]

    def _post(self, facts: Sequence[int]) -> None:
        if self.group is None:
            self.pending = (list(facts), None)
            return
        tensor = torch.tensor(facts, dtype=torch.int64)
        self.pending = (tensor, dist.all_reduce(tensor, group=self.group, async_op=True))

    def _wait(self) -> list[int]:
        facts, work = self.pending
        if work is not None:
            work.wait()
        sums = facts if isinstance(facts, list) else [int(v) for v in facts]
        self.pending = ([0] * len(sums), None)
        return sums
