"""Runs work once per machine, such as reading a million files. The other processes wait, and report that they are alive."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from tltrain.core import files
from tltrain.core.errors import StoppedAtOnce, UserError
from tltrain.core.output import progress
from tltrain.distributed.runtime import Runtime
from tltrain.distributed.signals import StopSignal

T = TypeVar("T")
MEET_S = 0.5
"""Least time between two meetings while somebody still works, seconds."""


def once_per_machine(
    runtime: Runtime, stop: StopSignal, folder: Callable[[], Path], work: Callable[[], T], is_shared: Callable[[T], bool]
) -> T:
    """The result of `work`, done by the first process of each machine and read by the others there from a file in `folder()`. Collective.

    However long it takes, no collective call waits longer than between two reports of progress. A signal to any process ends it on all of
    them with StoppedAtOnce. A UserError of one is raised on all. is_shared: of a result, whether the others are to have it; if not, they
    do the work themselves, as do those that cannot read the file. With one process this is `work()`.
    """
    if runtime.world == 1:
        return work()
    meeting, offer, result = _Meeting(runtime, stop), _Offer(socket.gethostname()), None
    try:
        if runtime.local_rank == 0:
            with progress.heard_by(meeting.while_working):
                try:
                    result = work()
                    offer.put(folder, result, is_shared(result))
                except UserError as error:
                    offer.error = error
        while not meeting.hold(over=True):
            pass
        offers: list[Any] = [None] * runtime.world
        dist.all_gather_object(offers, offer, group=runtime.side)
        if runtime.local_rank > 0:
            result = _read(offers[runtime.rank - runtime.local_rank], offer.host)
        dist.barrier(group=runtime.side)  # the others have read the file
    finally:
        offer.remove()
    for theirs in offers:
        if theirs.error is not None:
            raise theirs.error
    return work() if result is None else result


def _read(offer: _Offer, host: str) -> Any:
    """The result in the file of another process. None if there is none for this one."""
    if offer.file is None or offer.host != host:
        return None
    with suppress(OSError, pickle.UnpicklingError, EOFError):
        return pickle.loads(files.read_bytes(offer.file))  # written by our own run, under a random name that no other process knows
    return None


class _Offer:
    """The result of a machine's first process for the others: a file, or its error."""

    def __init__(self, host: str) -> None:
        self.host, self.file, self.error = host, cast(Path | None, None), cast(UserError | None, None)

    def put(self, folder: Callable[[], Path], result: Any, is_shared: bool) -> None:
        if not is_shared:
            return
        file = files.temporary_for(folder() / "answer")
        with suppress(pickle.PicklingError, TypeError, AttributeError, OSError):  # then each does the work itself
            content = pickle.dumps(result, protocol=5)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                self.file = file
                out.write(content)

    def remove(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)


class _Meeting:
    """Short collective calls that share whether each process is done, and whether it has received a signal."""

    def __init__(self, runtime: Runtime, stop: StopSignal) -> None:
        self.runtime, self.stop, self.last = runtime, stop, 0.0

    def while_working(self, how_far: str) -> None:
        self.hold(over=False)

    def hold(self, over: bool) -> bool:
        """Whether all are done. Raises StoppedAtOnce on all processes if a signal has reached one. Collective."""
        if not over and time.monotonic() - self.last < MEET_S:
            return False
        asked = 0 if self.stop.signal is None else int(signal.Signals[self.stop.signal])
        said = torch.tensor([int(not over), asked])
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.runtime.side)
        self.last = time.monotonic()
        busy, number = said.tolist()
        if number:
            raise StoppedAtOnce(signal.Signals(number).name)
        return busy == 0
