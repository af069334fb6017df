"""All-reduce of small flags, so that all ranks take the same decision at the same step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tltrain.distributed.runtime import Runtime


class FlagAllReduce:
    """Sums flags over all ranks: each rank contributes what it alone has observed (a signal, a timer, a loss that is not finite).

    The reduction runs on a gloo group on the host, so it never waits for the GPU. Flags are small non-negative integers.
    """

    def __init__(self, runtime: Runtime, num_flags: int) -> None:
        self.group = runtime.side
        self.pending: tuple[Tensor | list[int], Any] = ([0] * num_flags, None)

    def sum_previous(self, flags: Sequence[int]) -> list[int]:
        """Start the all-reduce of this step's flags, and return the sums of the flags given in the call before. Collective."""
        sums = self._wait()
        self._post(flags)
        return sums

    def sum_now(self, flags: Sequence[int]) -> list[int]:
        """The sums of these flags and of those that are still pending. Waits for all ranks. Collective."""
        before = self._wait()
        self._post(flags)
        return [a + b for a, b in zip(before, self._wait(), strict=True)]

    def _post(self, flags: Sequence[int]) -> None:
        if self.group is None:
            self.pending = (list(flags), None)
            return
        tensor = torch.tensor(flags, dtype=torch.int64)
        self.pending = (tensor, dist.all_reduce(tensor, group=self.group, async_op=True))

    def _wait(self) -> list[int]:
        flags, work = self.pending
        if work is not None:
            work.wait()
        sums = flags if isinstance(flags, list) else [int(v) for v in flags]
        self.pending = ([0] * len(sums), None)
        return sums
