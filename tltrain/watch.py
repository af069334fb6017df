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

from tltrain import files

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
        self.place, self.since = ("", 0, "start"), time.monotonic()
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
        interval = min(BEAT_S, self.timeout_s / 4)
        while not self.over.wait(interval):
            self._beat()
            if self.rank == 0 and not self.taken_over:
                newest = newest_generation(self.folder)
                if newest > self.generation:
                    self.taken_over = True
                    self.superseded(newest)
            if self.world > 1 and time.monotonic() - self.since > self.timeout_s:
                sys.stderr.write(self._accusation() + "\n")
                sys.stderr.flush()
                self.failed(self._failure())
                os._exit(1)  # the main thread waits in a call that never returns: no exception reaches it

    def _beat(self) -> None:
        stage, step, call = self.place
        value = {"time": time.time(), "stage": stage, "step": step, "call": call, "pid": os.getpid()}
        try:
            files.replace_text(beat_file(self.folder, self.generation, self.rank), json.dumps(value))
        except OSError as error:  # a full disk must not end a run that could still go on; the main thread meets it when it saves
            sys.stderr.write(f"tltrain: rank {self.rank} could not write its sign of life: {error}\n")

    def _accusation(self) -> str:
        stage, step, call = self.place
        lines = [f"tltrain: rank {self.rank} has waited {self.timeout_s:.0f} s in stage {stage}, step {step} ({call}), and ends itself"]
        for rank in range(self.world):
            seen = read_beat(self.folder, self.generation, rank)
            if rank == self.rank:
                continue
            if seen is None:
                lines.append(f"  rank {rank} has never been seen")
                continue
            ago = time.time() - seen["time"]
            verdict = "silent: it is stopped, dead or cut off" if ago > 3 * min(BEAT_S, self.timeout_s / 4) else "alive"
            lines.append(
                f"  rank {rank} was at stage {seen['stage']}, step {seen['step']} ({seen['call']}), seen {ago:.0f} s ago: {verdict}"
            )
        return "\n".join(lines)

    def _failure(self) -> dict[str, Any]:
        stage, step, call = self.place
        return {"outcome": "failed", "error": self._accusation(), "rank": self.rank, "stage": stage, "step": step, "call": call}


def beat_file(generations: Path, generation: int, rank: int) -> Path:
    return generations / f"{generation:06d}.rank{rank:05d}"


def read_beat(generations: Path, generation: int, rank: int) -> dict[str, Any] | None:
    try:
        return dict(json.loads(beat_file(generations, generation, rank).read_text()))
    except (OSError, ValueError):
        return None


def newest_generation(generations: Path) -> int:
    """The highest generation that was claimed; 0 for none."""
    return max((int(path.name) for path in generations.iterdir() if path.name.isdigit()), default=0) if generations.is_dir() else 0
