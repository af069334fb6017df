"""Stops a run of three stages at every step boundary, in worlds of 1, 2 and 4, with and without data workers: each ends equal."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import trials, world
from benchmarks.trials import HEAD, LAST, MIDDLE
from benchmarks.world import Trial

START = {"max_device_batch": 4, "save_steps": 100}


@dataclass(frozen=True)
class Case:
    """One stop."""

    num_processes: int
    workers: int
    num_steps: int
    """Optimizer steps before the signal."""
    rank: int
    """The process that gets it."""


def three_stages(teacher: Path) -> dict[str, Any]:
    """Stage ends, accumulation, early stopping, a teacher, dropout, mixup, SGD and AdamW, trained statistics."""
    early = HEAD | {"name": "early", "steps": 6, "lr": 1e-30, "patience": 1, "carry": "best"}
    last = LAST | {"norm_stats": "train", "warmup": 0.4}
    distill = {"teacher": {"weights": str(teacher)}, "temperature": 2.0, "weight": 0.5}
    backbone = trials.NETS["resnet-tiny"] | {"dropout": 0.2}
    # by loss: a head of zeros finds classes at any learning rate, since top-1 asks only for the largest of its logits
    return trials.recipe(backbone=backbone, select="loss", distill=distill, stages=[early, MIDDLE | {"mixup": 0.3}, last])


def stop_and_go_on(trial: Trial, case: Case) -> list[str]:
    """Stop a trial, start it again with the same command, and let it end. Returns what went wrong."""
    stopped = replace(trial, before="signal_after", arguments=(case.num_steps, case.rank))
    codes = world.run(stopped)
    if codes != [75] * case.num_processes:
        return [f"exit codes {codes} at the stop: {world.log(stopped)}"]
    codes = world.run(trial)
    return [] if codes == [0] * case.num_processes else [f"exit codes {codes} afterwards: {world.log(trial)}"]


def num_steps_of(run: Path) -> int:
    """Optimizer steps that a finished run took, early stopping considered."""
    return sum(row["step"] for row in trials.rows_of(run) if row["kind"] == "stage_end")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__)
    parser.add_argument("--trials", type=int, default=None, help="stops, drawn from all (default: every one)")
    parser.add_argument("--seed", type=int, default=0, help="draws them, and the process that gets the signal (default: 0)")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes (default: 1 2 4)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="data workers (default: 0 2)")
    arguments = parser.parse_args(words)
    began, draw, num_bad = time.monotonic(), random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        teacher = world.finish(Trial(trials.recipe(), f"{scratch}/teacher/run"))
        spec, undisturbed = three_stages(teacher), {}
        for num in arguments.worlds:
            undisturbed[num] = world.finish(Trial(spec, f"{scratch}/undisturbed-{num}/run", num, start=START))
        num_steps = num_steps_of(undisturbed[arguments.worlds[0]])
        cases = [Case(n, w, s, draw.randrange(n)) for n in arguments.worlds for w in arguments.workers for s in range(1, num_steps)]
        if arguments.trials is not None:
            cases = draw.sample(cases, min(arguments.trials, len(cases)))
        for i, case in enumerate(cases):
            trial = Trial(spec, f"{scratch}/{i}/run", case.num_processes, start=START | {"workers": case.workers})
            problems = stop_and_go_on(trial, case) or trials.differences(Path(trial.folder), undisturbed[case.num_processes])
            num_bad += bool(problems)
            print(f"{i:3} {case}: {'; '.join(problems) or 'equal'}", flush=True)
    print(f"{len(cases)} stops, {num_bad} that differ, seed {arguments.seed}, {time.monotonic() - began:.0f} s")
    raise SystemExit(num_bad > 0)


if __name__ == "__main__":
    main()
