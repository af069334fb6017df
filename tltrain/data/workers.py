"""DataLoader worker processes, forked from a separate fork server that holds no CUDA context and ignores stop signals."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, popen_forkserver, resource_tracker, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess, reduction, set_spawning_popen  # type: ignore[attr-defined]
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from tltrain.core.errors import UserError

PRELOADED = "tltrain.data.views"
"""Module that the fork server imports once for all workers."""


class Loader(DataLoader[dict[str, Tensor]]):
    """A DataLoader that re-raises a worker's UserError with its original text, without the worker's stack trace."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            # The traceback keeps the workers alive. Dropping it ends them now: left to the garbage collector, they lose their queues first
            # and torch waits 5 s for each.
            error.__traceback__ = None
            raise UserError(str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2].strip()) from None


def worker_options(num_workers: int) -> dict[str, Any]:
    """DataLoader arguments for this many workers. Empty for 0."""
    if num_workers == 0:
        return {}
    return {"num_workers": num_workers, "multiprocessing_context": _Context(), "worker_init_fn": _die_with_parent}


class _Server(forkserver.ForkServer):
    """A fork server of our own, beside Python's default one.

    Workers forked from the trainer would inherit its CUDA context, sockets and signal handlers. After a crash they would keep the
    device's memory, and other ranks would wait for them. The server starts with the stop signals blocked, and its workers inherit that.
    Ctrl-C and Slurm send these signals to every process, but the trainer needs its workers until it has finished its step.
    Python's default server must stay unchanged: processes that a notebook or another library forks from it need their signals.
    """

    def ensure_running(self) -> None:
        resource_tracker.ensure_running()  # start it first: its start unblocks signals
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2})
        try:
            super().ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


_SERVER = _Server()
_SERVER.set_forkserver_preload([PRELOADED])


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: Any) -> None:
        """Python's own (multiprocessing/popen_forkserver.py), which knows its one server alone, except for the caller's main module.

        Python runs that anew in each process: a script would need its `if __name__ == "__main__"`, and a program imports everything that
        it has. Here only a worker that is handed something from there does so.
        """
        data, work, preparation = io.BytesIO(), io.BytesIO(), spawn.get_preparation_data(process_obj._name)
        set_spawning_popen(self)
        try:
            reduction.dump(process_obj, work)
            if b"__main__" not in work.getvalue():
                preparation = {key: value for key, value in preparation.items() if not key.startswith("init_main_from_")}
            reduction.dump(preparation, data)
            data.write(work.getbuffer())
        finally:
            set_spawning_popen(None)
        self.sentinel, write_end = _SERVER.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        parent_end = os.dup(write_end)  # the child sees the parent die when this descriptor closes
        self.finalizer = util.Finalize(self, util.close_fds, (parent_end, self.sentinel))  # type: ignore[attr-defined]
        with open(write_end, "wb", closefd=True) as file:
            file.write(data.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)

    def terminate(self) -> None:
        """Kill the worker. At exit Python sends SIGTERM to daemons and waits for them, but workers block SIGTERM."""
        self.kill()


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:
        return _Popen(process_obj)


class _Context(ForkServerContext):
    Process = _Process


def _die_with_parent(worker: int) -> None:
    """End the worker when the trainer dies. torch's own watchdog sees the fork server as the parent, which lives on."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name=f"parent-of-loader-{worker}").start()
