"""Kills runs with SIGKILL at random moments: none may be lost or unreadable, and each must end equal to one that was never disturbed."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import trials
from benchmarks.trials import Moments, References
from benchmarks.world import Trial

START = {"save_steps": 1, "timeout_minutes": 0.3}
MOST_KILLS = 4  # of one run


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="kills, up to four of one run (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (default: 0)")
    parser.add_argument("--two", type=float, default=0.3, help="share of the runs with two processes (default: 0.3)")
    arguments = parser.parse_args(words)
    began, draw, calls, num_runs = time.monotonic(), random.Random(arguments.seed), Counter[str](), 0
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        references, moments = References(Path(scratch) / "undisturbed", START), dict[int, Moments]()
        while calls.total() < arguments.trials:
            num_runs += 1
            num = 2 if draw.random() < arguments.two else 1
            trial = Trial(trials.recipe(), f"{scratch}/{num_runs}/run", num, start=START)
            num_kills = min(MOST_KILLS, arguments.trials - calls.total())
            undisturbed = references(num)
            when = moments.setdefault(num, Moments(draw, references.seconds[num]))
            killed = trials.killed_run(trial, undisturbed, num_kills, when)
            calls.update(call for place in killed.places for call in [place.partition(",")[0].split(maxsplit=2)[-1]])
            problems += killed.problems
            world_of = f"{num} process{'es' if num > 1 else ''}"
            print(f"run {num_runs:3}, {world_of}: {'; '.join(killed.places)}: {'; '.join(killed.problems) or 'ended equal'}", flush=True)
    print("killed in: " + ", ".join(f"{call} {number}" for call, number in calls.most_common()))
    seconds = time.monotonic() - began
    print(f"{calls.total()} kills of {num_runs} runs, {len(problems)} problems, seed {arguments.seed}, {seconds:.0f} s")
    raise SystemExit(len(problems) > 0)


if __name__ == "__main__":
    main()
