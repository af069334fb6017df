"""Trains runs side by side, each in a process of its own: on its own GPU, or on its share of the processor cores."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.command import Training
from tltrain.core.errors import UserError
from tltrain.core.host.cores import num_cores
from tltrain.core.output import escape
from tltrain.distributed.signals import StopSignal
from tltrain.many.one_by_one import OneRun
from tltrain.runs import run_dir

POLL_S = 0.1
_OUTCOMES = {0: "finished", 75: "stopped"}
"""By exit code of `tltrain train`."""


@dataclass(frozen=True)
class _Child:
    run: OneRun
    process: subprocess.Popen[bytes]
    log: Path
    slot: int


def jobs_at_a_time(verb: str, jobs: int | None) -> int:
    """Runs at a time. None: one a GPU, else one. Raises UserError for fewer than one, and under a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"tltrain {verb} starts its runs by itself, one a GPU; start it without a launcher")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}; it must be at least 1")
    return max(1, torch.cuda.device_count()) if jobs is None else jobs


def train_side_by_side(runs: Sequence[OneRun], jobs: int, logs: Path, say: Callable[[str], None], past_failures: bool = False) -> str:
    """Train the runs, `jobs` at a time. The output of each goes to a file in `logs`. past_failures: as in `train_one_by_one`.

    Returns finished, stopped or failed. After a failure no further run is begun, and those that train go on to their end. A signal stops
    them all with their checkpoints; a second Ctrl-C ends them at once. Raises UserError where a run was refused.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, training, ended = list(runs), list[_Child](), list[tuple[_Child, int]]()
    with StopSignal().listening() as stop:
        try:
            told: str | None = None
            while training or (waiting and stop.signal is None and not _ends(ended, past_failures)):
                while waiting and len(training) < jobs and stop.signal is None and not _ends(ended, past_failures):
                    slot = min(set(range(jobs)) - {child.slot for child in training})
                    training.append(_begin(waiting.pop(0), slot, jobs, logs, say))
                if stop.signal is not None and told is None:
                    told = stop.signal
                    for child in training:
                        child.process.send_signal(signal.Signals[told])
                for child in [child for child in training if child.process.poll() is not None]:
                    training.remove(child)
                    ended.append((child, child.process.returncode))
                    say(_end_line(child))
                time.sleep(POLL_S)
        finally:
            for child in training:  # none is left but after a second Ctrl-C
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)
    return _together(ended, stopped=stop.signal is not None)


def _ends(ended: Sequence[tuple[_Child, int]], past_failures: bool) -> bool:
    """Whether a run has ended in a way that keeps the others from being begun: any failure, or else one that all would meet."""
    return any(code == 2 if past_failures else _failed(code) for _, code in ended)


def _failed(code: int) -> bool:
    return code not in _OUTCOMES


def _together(ended: Sequence[tuple[_Child, int]], stopped: bool) -> str:
    refused = next((child for child, code in ended if code == 2), None)
    if refused is not None:
        raise UserError(f"{refused.run.name} was refused: {_last_line(refused.log)}; the whole message stands in {refused.log}")
    if any(_failed(code) for _, code in ended) and not stopped:
        return "failed"
    return "stopped" if stopped or any(code == 75 for _, code in ended) else "finished"


def _begin(run: OneRun, slot: int, jobs: int, logs: Path, say: Callable[[str], None]) -> _Child:
    assert run.start.folder is not None
    run_dir.create(run.start.folder, run.recipe)
    command = [sys.executable, "-m", "tltrain", *Training(run.recipe, run.start, run.start.folder).argv]
    environment, where = _place(slot, jobs, os.environ, torch.cuda.device_count())
    log = logs / f"{run.name}.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    say(f"{run.name}    begun on {where}, log {log}")
    return _Child(run, process, log, slot)


def _place(slot: int, jobs: int, environment: Mapping[str, str], num_gpus: int) -> tuple[dict[str, str], str]:
    """(environment of a process, where it runs): a GPU that is its own as far as they go round, or its share of the cores."""
    if num_gpus:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = [str(i) for i in range(num_gpus)] if visible is None else [name.strip() for name in visible.split(",")][:num_gpus]
        name = names[slot % len(names)]
        return {"CUDA_VISIBLE_DEVICES": name}, f"GPU {name}"
    threads = environment.get("OMP_NUM_THREADS") or str(max(1, num_cores() // jobs))
    return {"OMP_NUM_THREADS": threads}, f"the CPU, {threads} thread{'s' if threads != '1' else ''}"


def _end_line(child: _Child) -> str:
    code = child.process.returncode
    if code == 0:
        return f"{child.run.name}    finished"
    how = _OUTCOMES.get(code, f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}")
    return f"{child.run.name}    {how}: {escape.line(_last_line(child.log))}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"
