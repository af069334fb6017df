"""A thread beside the loop: it says that this process lives, sees that a newer start has taken the run over, and ends a
process that waits for ever for one that is gone.

Nothing here communicates: a process that hangs in a collective call could not answer. Each process writes where it
stands into a small file of its own; whoever waits too long reads the others' files and says who is missing.
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
from tltrain.runs.heartbeat import beat_file, failed_file, newest_generation, read_beat

BEAT_S = 5.0  # at most this long between two signs of life


class Watch:
    """Where this process stands, for itself and for others. `at` costs an assignment."""

    def __init__(
        self,
        run: Path,
        generation: int,
        rank: int,
        world: int,
        timeout_s: float,
        superseded: Callable[[int], None],
        failed: Callable[[dict[str, Any]], None],
    ) -> None:
        """timeout_s: a process of several that stays this long at one place calls failed(details) and ends itself.
        superseded(generation) is called, once, on process 0 when a higher generation appears."""
        self.folder = run / "generations"
        self.generation, self.rank, self.world, self.timeout_s = generation, rank, world, timeout_s
        self.superseded, self.failed, self.taken_over = superseded, failed, False
        self.interval_s = min(BEAT_S, timeout_s / 4)
        self.place, self.since = ("", 0, "start"), time.monotonic()
        self.left_since: float | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._live, name="tltrain-watch", daemon=True)
        self._beat()
        self.thread.start()

    def at(self, stage: str, step: int, call: str) -> None:
        """This process is now in `call` (train, evaluate, save, agree) of a step."""
        self.place, self.since = (stage, step, call), time.monotonic()

    def close(self) -> None:
        self.over.set()
        self.thread.join(timeout=10)

    def _live(self) -> None:
        while not self.over.wait(self.interval_s):
            self._beat()
            if self.rank == 0 and not self.taken_over:
                newest = newest_generation(self.folder)
                if newest > self.generation:
                    self.taken_over = True
                    self.superseded(newest)
            if self.world > 1 and time.monotonic() - self.since > self.timeout_s:
                details = self._hang_report()
                sys.stderr.write(f"tltrain: {details['error']}\n")
                sys.stderr.flush()
                self.failed(details)
                os._exit(1)  # the main thread waits in a call that never returns: no exception reaches it
            if self.world > 1 and self._left_alone():
                sys.stderr.write(f"tltrain: rank {self.rank} waits for a process that has left, and ends itself\n")
                sys.stderr.flush()
                os._exit(1)  # as above; the other has said why

    def _left_alone(self) -> bool:
        """Whether another process has ended this start a while ago, and this one is still where it was."""
        if self.left_since is None and failed_file(self.folder, self.generation).exists():
            self.left_since = time.monotonic()
        return self.left_since is not None and time.monotonic() - max(self.left_since, self.since) > 3 * self.interval_s

    def _beat(self) -> None:
        stage, step, call = self.place
        value = {"time": time.time(), "stage": stage, "step": step, "call": call, "pid": os.getpid()}
        try:
            files.replace_text(beat_file(self.folder, self.generation, self.rank), json.dumps(value))
        except OSError as error:  # a full disk must not end a run that could still go on; the main thread meets it when it saves
            sys.stderr.write(f"tltrain: rank {self.rank} could not write its sign of life: {error}\n")

    def missing(self) -> dict[str, Any] | None:
        """After a call between processes has broken: the first process that gives no new sign of life, as the details of a failure.

        Waits for a sign of each, one beat and a half at most. None where all live.
        """
        beats = {rank: read_beat(self.folder, self.generation, rank) for rank in range(self.world) if rank != self.rank}
        silent, deadline = set(beats), time.monotonic() + 1.5 * self.interval_s
        while silent and time.monotonic() < deadline:
            time.sleep(min(0.1, self.interval_s / 4))
            silent = {rank for rank in silent if read_beat(self.folder, self.generation, rank) == beats[rank]}
        if not silent:
            return None
        rank, mine = min(silent), dict(zip(("stage", "step", "call"), self.place, strict=True))
        error = f"rank {rank} is gone; rank {self.rank} met this in {_words(mine)}"
        return {"outcome": "failed", "error": error, "rank": rank, **mine}

    def _hang_report(self) -> dict[str, Any]:
        """Who this process has waited for and where, as the details of a failure: the first silent process, or itself where all live."""
        mine = dict(zip(("stage", "step", "call"), self.place, strict=True))
        lines = [f"rank {self.rank} has waited {self.timeout_s:.0f} s in {_words(mine)}, and ends itself"]
        guilty = self.rank
        for rank in reversed([rank for rank in range(self.world) if rank != self.rank]):
            seen = read_beat(self.folder, self.generation, rank)
            ago_s = time.time() - seen["time"] if seen else float("inf")
            if ago_s > 3 * self.interval_s:
                guilty = rank
            verdict = "silent: it is stopped, dead or cut off" if ago_s > 3 * self.interval_s else "alive"
            where = f"was last seen {ago_s:.0f} s ago in {_words(seen)}" if seen else "has never been seen"
            lines.insert(1, f"  rank {rank} {where}: {verdict}")
        return {"outcome": "failed", "error": "\n".join(lines), "rank": guilty, **mine}


def _words(place: dict[str, Any]) -> str:
    return f"stage {place['stage']}, step {place['step']} ({place['call']})" if place["stage"] else str(place["call"])
