"""Watchdog thread: writes this process's heartbeat, notices that a newer start has taken the run over, and ends a process that hangs.

It makes no collective calls, since a process that hangs in one could not answer. Each process writes its position into a small file of
its own. A process that has waited too long reads the files of the others and reports which one is missing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tltrain.core import files
from tltrain.runs import run_dir
from tltrain.runs.heartbeat import beat_file, failed_file, newest_generation, read_beat

BEAT_S = 5.0  # at most this long between two signs of life
PAUSED_S = 10.0
"""A gap between two beats that is this much longer, seconds, means that the process was paused."""
GRACE_S = 10.0
"""Time that the main thread has to answer an error, seconds."""
CALLER = "the caller's on_step"
"""The `call` of a position in code of the caller. That may take as long as it likes, as a debugger does."""


class Watch:
    """Heartbeat and hang detection of one process. `at` records its position and costs one assignment."""

    def __init__(
        self,
        run: Path,
        generation: int,
        rank: int,
        world: int,
        timeout_s: float,
        superseded: Callable[[int], None],
        failed: Callable[[dict[str, Any]], None],
        break_off: Callable[[str], bool] = lambda why: False,
    ) -> None:
        """Writes the first heartbeat and starts the thread.

        timeout_s: longest time at one position, seconds. With several processes, a longer one calls failed(details) and exits with 1.
        break_off: a single process calls it with a text first, to raise an error in the main thread, and exits only if that does not help.
        It returns False where the process belongs to another program, such as a notebook: that is not ended.
        superseded: called once on process 0 with the new generation, when a newer start has claimed the run.
        """
        self.folder = run_dir.generations(run)
        self.generation, self.rank, self.world, self.timeout_s = generation, rank, world, timeout_s
        self.superseded, self.failed, self.taken_over, self.break_off = superseded, failed, False, break_off
        self.interval_s = min(BEAT_S, timeout_s / 4)
        self.place, self.since = ("", 0, "start"), time.monotonic()
        self.left_since: float | None = None
        self.broken_off: float | None = None
        found = self.folder.stat()
        self.identity = found.st_dev, found.st_ino
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._live, name="tltrain-watch", daemon=True)
        self._beat()
        self.thread.start()

    def at(self, stage: str, step: int, call: str) -> None:
        """Record that this process is now in `call` (train, evaluate, save, agree) of a step."""
        self.place, self.since = (stage, step, call), time.monotonic()

    def alive(self) -> None:
        """Record that this process goes on at its position, such as with a large file that grows."""
        self.since = time.monotonic()

    def close(self) -> None:
        self.over.set()
        self.thread.join(timeout=10)

    def present(self) -> bool:
        """Whether the run folder is still where this start found it: not renamed, deleted, or replaced by another."""
        try:
            found = self.folder.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a file server that does not answer for a while
            return True
        return (found.st_dev, found.st_ino) == self.identity

    def may_write(self) -> bool:
        return not self.taken_over and self.present()

    def _live(self) -> None:
        last = time.monotonic()
        while not self.over.wait(self.interval_s):
            now = time.monotonic()
            paused_s, last = now - last, now
            if paused_s > PAUSED_S + self.interval_s:  # the whole process stood still, as after Ctrl-Z: that is no hang
                self.since += paused_s
            self._beat()
            if self.rank == 0 and not self.taken_over:
                newest = newest_generation(self.folder)
                if newest > self.generation or not self.present():
                    self.taken_over = True
                    self.superseded(newest if newest > self.generation else 0)
            if self.world > 1 and time.monotonic() - self.since > self.timeout_s:
                details = self._hang_report()
                sys.stderr.write(f"tltrain: {details['error']}\n")
                sys.stderr.flush()
                self.failed(details)
                os._exit(1)  # the main thread is blocked in a collective call: no exception reaches it
            if self.world == 1 and now - self.since > self.timeout_s and self.place[2] != CALLER:
                self._end_single()
            if self.world > 1 and self._waits_for_failed():
                sys.stderr.write(f"tltrain: rank {self.rank} waits for a process that has exited, so it exits too\n")
                sys.stderr.flush()
                os._exit(1)  # as above; the other process has printed the reason

    def _end_single(self) -> None:
        """End a single process that hangs: by an error in its main thread, and if that thread does not answer, by leaving."""
        stage, step, call = self.place
        details: dict[str, Any] = {"outcome": "failed", "rank": self.rank, "stage": stage, "step": step, "call": call}
        details["error"] = (
            f"no progress for {self.timeout_s:.0f} s in {_position_text(details)}: often a disk or a network mount does not answer. The "
            "same command goes on from the newest checkpoint; --timeout-minutes sets the longest wait"
        )
        if self.broken_off is None:
            self.broken_off, ours = time.monotonic(), self.break_off(details["error"])
            if ours:
                return
            self.broken_off = float("inf")
            sys.stderr.write(f"tltrain: {details['error']}\n")
            self.failed(details)
        elif time.monotonic() - self.broken_off > GRACE_S + self.interval_s:
            sys.stderr.write(f"tltrain: {details['error']}\n")
            sys.stderr.flush()
            threading.Thread(target=self.failed, args=(details,), daemon=True).start()  # the run folder may be what does not answer
            time.sleep(self.interval_s)
            os._exit(1)

    def _waits_for_failed(self) -> bool:
        """Whether another process recorded a failure more than three beats ago, and this one has not moved since."""
        if self.left_since is None and failed_file(self.folder, self.generation).exists():
            self.left_since = time.monotonic()
        return self.left_since is not None and time.monotonic() - max(self.left_since, self.since) > 3 * self.interval_s

    def _beat(self) -> None:
        stage, step, call = self.place
        value = {"time": time.time(), "stage": stage, "step": step, "call": call, "pid": os.getpid()}
        try:
            files.replace_text(beat_file(self.folder, self.generation, self.rank), json.dumps(value))
        except OSError as error:  # a full disk must not end a run that could go on; the next checkpoint reports it
            sys.stderr.write(f"tltrain: rank {self.rank} could not write its heartbeat: {error}\n")

    def missing(self) -> dict[str, Any] | None:
        """After a failed collective call: failure details that name the lowest rank without a new heartbeat, or None if all are alive.

        Waits at most one and a half beats for a new heartbeat of every other rank.
        """
        beats = {rank: read_beat(self.folder, self.generation, rank) for rank in range(self.world) if rank != self.rank}
        silent, deadline = set(beats), time.monotonic() + 1.5 * self.interval_s
        while silent and time.monotonic() < deadline:
            time.sleep(min(0.1, self.interval_s / 4))
            silent = {rank for rank in silent if read_beat(self.folder, self.generation, rank) == beats[rank]}
        if not silent:
            return None
        rank, mine = min(silent), dict(zip(("stage", "step", "call"), self.place, strict=True))
        error = f"rank {rank} is gone; rank {self.rank} noticed it in {_position_text(mine)}"
        return {"outcome": "failed", "error": error, "rank": rank, **mine}

    def _hang_report(self) -> dict[str, Any]:
        """Failure details of a time-out: a line on each rank, and the lowest silent rank (or this one if all are alive)."""
        mine = dict(zip(("stage", "step", "call"), self.place, strict=True))
        lines = [f"rank {self.rank} has waited {self.timeout_s:.0f} s in {_position_text(mine)}, and exits"]
        silent_rank = self.rank
        for rank in reversed([rank for rank in range(self.world) if rank != self.rank]):
            beat = read_beat(self.folder, self.generation, rank)
            ago_s = time.time() - beat["time"] if beat else float("inf")
            if ago_s > 3 * self.interval_s:
                silent_rank = rank
            verdict = "silent: it is stopped, dead or cut off" if ago_s > 3 * self.interval_s else "alive"
            where = f"was last seen {ago_s:.0f} s ago in {_position_text(beat)}" if beat else "has never been seen"
            lines.insert(1, f"  rank {rank} {where}: {verdict}")
        return {"outcome": "failed", "error": "\n".join(lines), "rank": silent_rank, **mine}


def _position_text(place: dict[str, Any]) -> str:
    return f"stage {place['stage']}, step {place['step']} ({place['call']})" if place["stage"] else str(place["call"])
