"""DataLoader worker processes, forked from a separate fork server that holds no CUDA context and ignores stop signals.

Every wait for a worker has a limit. The error says how the worker ended, and what the user can do.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, popen_forkserver, resource_tracker, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess, reduction, set_spawning_popen  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tltrain.core.errors import MachineError, UserError
from tltrain.core.host.cores import num_cores

PRELOADED = "tltrain.data.views"
"""Module that the fork server imports once for all workers."""
MOST_WORKERS = 16
"""Data workers of a process at most. On 16 cores, 16 fed a ResNet-50 with 1.6 times the JPEG files of 8 (docs/speed.md)."""
WAIT_S = 540.0
"""The longest wait for one batch, seconds. A worker that is alive and sends nothing for so long has lost its batch."""
STOPPING_S = 20.0
"""The longest wait for one batch after a stop was requested, seconds."""
ENDED_S = 15.0
"""The longest wait for the exit code of a worker whose connection is lost, seconds."""
SHARED_MEMORY = Path("/dev/shm")
READ_AHEAD = 3
"""Batches of one worker in shared memory: two prefetched (torch's prefetch_factor), one in use."""
LOADERS = 2
"""Loaders that are open at a time: an evaluation opens its own while batches of training wait."""
MORE_SHARED_MEMORY = "Give it more (docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm), or choose --workers"

_should_stop: Callable[[], bool] = bool
_wait_s: float | None = None
_printed: set[str] = set()
"""The notes that were printed already. Each is printed once."""
_runs_main: str | None = None
"""The caller's main module, if workers run it anew because something in it was sent to them. None: they do not."""
NEEDS_MAIN = (
    "Each worker runs the script anew, because what reads the images is defined in it: put what starts the training under `if __name__ == "
    '"__main__":`, move what reads to a module of its own, or take workers=0'
)


@contextmanager
def heard_while_waiting(should_stop: Callable[[], bool], wait_s: float | None = None) -> Iterator[None]:
    """Inside, a wait for a batch ends soon after `should_stop` returns True. A batch that arrives in time is still returned.

    wait_s: the longest wait for one batch, seconds. None: WAIT_S.
    """
    global _should_stop, _wait_s
    before, _should_stop, _wait_s = (_should_stop, _wait_s), should_stop, wait_s
    try:
        yield
    finally:
        _should_stop, _wait_s = before


def default_workers(local_world: int) -> int:
    """Data workers of each of the machine's processes: its share of the cores, at most MOST_WORKERS."""
    return min(MOST_WORKERS, max(1, num_cores() // local_world))


def fitting(num_workers: int, batch_bytes: int) -> int:
    """The number of workers whose batches fit in shared memory, at most `num_workers`. If it is fewer, a note is printed once.

    batch_bytes: size of one batch.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return num_workers
    fit = min(num_workers, free // max(1, LOADERS * READ_AHEAD * batch_bytes))
    if fit < num_workers:
        note = f"{SHARED_MEMORY} has {free / 1e6:,.1f} MB free, too little for the batches of {num_workers} data workers: {fit} are used"
        if note not in _printed:
            _printed.add(note)
            sys.stderr.write(f"tltrain: {note}. {MORE_SHARED_MEMORY}\n")
    return fit


def shared_batch(batch: Any) -> Any:  # torch's type of a collate_fn takes lists alone
    """The collate_fn for `Views.__getitems__`. In a worker, it moves the batch to shared memory.

    If that fails here, the error reaches the trainer. torch would move it in its sending thread, where an error is only printed: the batch
    is lost, and the trainer waits forever.
    """
    if get_worker_info() is not None:
        for tensor in batch.values():
            tensor.share_memory_()
    return batch


class _Batches(_MultiProcessingDataLoaderIter):
    """torch's iterator over the batches of its workers, with a limit on each wait."""

    waited_s = 0.0

    def _try_get_data(self, timeout: float = 1.0) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = super()._try_get_data(timeout)
        except (OSError, EOFError, RuntimeError) as error:
            if _is_loss(error) and (ended := self._ended()):
                raise _EndedError(ended) from error
            raise
        # torch calls this again and again until a batch has arrived (answer[0]). Count how long that takes.
        self.waited_s = 0.0 if answer[0] else self.waited_s + timeout
        if self.waited_s > (STOPPING_S if _should_stop() else WAIT_S if _wait_s is None else _wait_s):
            raise TimeoutError(f"no batch for {self.waited_s:.0f} s")
        return answer

    def _ended(self) -> str:
        """One line on the workers that ended too early. Empty if none did."""
        # A broken connection is noticed before the exit code is there, so wait a moment for the code.
        deadline = time.monotonic() + ENDED_S
        while True:
            codes = {worker.pid: worker.exitcode for worker in self._workers}  # 0: it has sent all its batches
            if any(codes.values()) or time.monotonic() > deadline:
                return ", ".join(f"process {pid} {_how(code)}" for pid, code in codes.items() if code)
            time.sleep(0.05)


class _EndedError(RuntimeError):
    """A data worker ended too early. The text says how."""


def _is_loss(error: Exception) -> bool:
    """Whether an error may come from a worker that has ended."""
    return isinstance(error, ConnectionError | EOFError | FileNotFoundError) or "DataLoader worker" in str(error)


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"was killed by signal {-code}"
    return f"ended with code {code}"


def _lost(error: Exception, num_workers: int) -> UserError | None:
    """The error for workers that ended or send nothing, with a remedy. None for an error of another kind."""
    text = str(error)
    if "shared memory" in text or ("/torch_" in text and "No space left" in text):
        return UserError(f"shared memory ({SHARED_MEMORY}) is full: {text.strip().splitlines()[-1]}. {MORE_SHARED_MEMORY} 0")
    fewer = f"with --workers {num_workers // 2} it takes less memory"
    if isinstance(error, _EndedError):
        why = "most likely the machine had no memory left (`dmesg` says so)" if "SIGKILL" in text else "its own error stands above"
        hint = f". {NEEDS_MAIN}" if _runs_main and "SIGKILL" not in text else ""
        return MachineError(
            f"a data worker has ended (DataLoader worker, {text}): {why}{hint}. The same command goes on from the newest checkpoint, and "
            f"{fewer}"
        )
    if isinstance(error, TimeoutError) or _is_loss(error):
        return MachineError(
            f"a data worker sends nothing any more ({type(error).__name__}: {text.partition(chr(10))[0]}); often a disk does not answer, "
            f"or the machine had no memory left. The same command goes on from the newest checkpoint; {fewer}"
        )
    return None


class Loader(DataLoader[dict[str, Tensor]]):
    """A DataLoader that re-raises a worker's UserError with its original text, without the worker's stack trace."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            # The traceback holds the iterator, and with it the workers. Drop it, so that they end now. If the garbage collector ended them,
            # their queues would be gone first, and torch would wait 5 s for each worker.
            error.__traceback__ = None
            raise UserError(str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2].strip()) from None
        except (OSError, EOFError, RuntimeError) as error:
            if self.num_workers == 0 or (lost := _lost(error, self.num_workers)) is None:
                raise
            error.__traceback__ = error.__context__ = error.__cause__ = None  # as above
            raise lost from None

    def _get_iterator(self) -> Any:
        return super()._get_iterator() if self.num_workers == 0 else _Batches(self)


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
        """Start a worker. As in Python's multiprocessing/popen_forkserver.py, which always uses Python's own server, with one difference.

        Python runs the caller's main module anew in every process. So a script would need `if __name__ == "__main__"`, and a large program
        would be imported by every worker. Here a worker runs it only if something defined in it is sent to the worker.
        """
        data, work, preparation = io.BytesIO(), io.BytesIO(), spawn.get_preparation_data(process_obj._name)
        set_spawning_popen(self)  # pickling needs to know for which process it pickles
        try:
            # Pickle the work first: the bytes tell whether the worker needs the main module. It is sent after `preparation`.
            reduction.dump(process_obj, work)
            if b"__main__" in work.getvalue():
                _check_main(preparation)
            else:
                preparation = {key: value for key, value in preparation.items() if not key.startswith("init_main_from_")}
            reduction.dump(preparation, data)
            data.write(work.getbuffer())
        finally:
            set_spawning_popen(None)
        # Let our server fork the worker. The sentinel closes when the worker dies, parent_end when the trainer dies.
        self.sentinel, write_end = _SERVER.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        parent_end = os.dup(write_end)
        self.finalizer = util.Finalize(self, util.close_fds, (parent_end, self.sentinel))  # type: ignore[attr-defined]
        # Send the work, and wait for the worker's process id.
        self.pid = forkserver.read_signed(self.sentinel)
        try:
            with open(write_end, "wb", closefd=True) as file:
                file.write(data.getbuffer())
        except BrokenPipeError as error:  # the worker ended while it ran the caller's script
            code = self.wait(timeout=ENDED_S)
            raise _EndedError(f"process {self.pid} {_how(code or 0)}") from error

    def terminate(self) -> None:
        """Kill the worker. At exit Python sends SIGTERM to daemons and waits for them, but workers block SIGTERM."""
        self.kill()


def _check_main(preparation: dict[str, Any]) -> None:
    """Remember that workers run the caller's main module. Raises UserError if that is not a file, so that no worker can run it."""
    global _runs_main
    _runs_main = preparation.get("init_main_from_name") or preparation.get("init_main_from_path")
    if _runs_main is None or (
        "init_main_from_path" in preparation and not Path(_runs_main).is_file()
    ):  # `python < script` has a path <stdin>
        raise UserError(
            "what reads the images is defined in a notebook, at the prompt or in `python -c`, where no data worker finds it; move it to a "
            "module (a .py file) and import it, or take workers=0"
        )


def refuse_in_worker() -> None:
    """End a worker that is running the caller's script: training there would start workers again, without end."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(f"tltrain: a data worker has come to a training. {NEEDS_MAIN}")  # no stack trace: the trainer has one


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
