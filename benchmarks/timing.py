"""Contestants in turns, and what their times say: rounds of A B B A, medians, a bootstrap of their ratio. Timing commands share it."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.demo_gain import cpu_name

LEAST_ROUNDS = 7
NUM_RESAMPLES = 10_000
PACKAGES = ("tltrain", "torch", "torchvision", "transformers", "accelerate", "numpy")


class Unequal(RuntimeError):
    """Contestants that should learn the same ended at different losses: their times mean nothing."""


@dataclass(frozen=True)
class Lap:
    """One run of a contestant."""

    seconds: float
    losses: tuple[float, ...]
    """What is held against the other contestants before time counts."""


@dataclass(frozen=True)
class Contestant:
    name: str
    run: Callable[[], Lap]
    learns: str = ""
    """Contestants with the same word must show the same losses."""
    also: tuple[str, ...] = ()
    """Packages whose versions are said beside the usual ones."""


@dataclass(frozen=True)
class Aim:
    """What one contestant should reach against the first: at most so many times its time, or at least so many times its speed."""

    contestant: str
    measure: Literal["time", "speed"]
    value: float


@dataclass(frozen=True)
class Case:
    """One comparison. The first contestant is the one that the others are held against."""

    title: str
    contestants: Sequence[Contestant]
    measure: Literal["time", "speed"]
    tolerance: float
    """Largest relative difference of losses; 0 demands equal bits."""
    num_steps: int | None = None
    """Times are shown per step where a lap times this many steps, else per lap."""
    bound: str = ""
    """What arithmetic says of the best that can be reached, one line."""
    aim: Aim | None = None


@dataclass(frozen=True)
class Row:
    """One contestant over all rounds."""

    name: str
    laps: list[float]
    """Seconds of every lap, in the order they were run: two a round."""
    rounds: list[float]
    """Seconds of each round: the mean of its two laps."""
    median: float
    ratio: tuple[float, float, float] | None
    """Against the first contestant, by the case's measure: of the medians, and the ends of its 95 % interval."""
    loss: float
    """The last one."""


@dataclass(frozen=True)
class Result:
    case: Case
    rows: list[Row]


def turns(num: int) -> list[int]:
    """One round: each of `num` contestants there and back (A B B A), so that a slow drift of the machine costs all alike."""
    return [*range(num), *reversed(range(num))]


def run_case(case: Case, num_rounds: int, say: Callable[[str], None]) -> Result:
    """A warm-up of each contestant, then the rounds. Raises Unequal."""
    num = len(case.contestants)
    losses: list[list[tuple[float, ...]]] = [[contestant.run().losses] for contestant in case.contestants]
    check_losses(case, losses)
    laps: list[list[float]] = [[] for _ in range(num)]
    for r in range(num_rounds):
        for i in turns(num):
            lap = case.contestants[i].run()
            laps[i].append(lap.seconds)
            losses[i].append(lap.losses)
        check_losses(case, losses)
        medians = (f"{c.name} {statistics.median(seconds):.3f} s" for c, seconds in zip(case.contestants, laps, strict=True))
        say(f"{case.title}: round {r + 1} of {num_rounds}: {', '.join(medians)}")
    return summarise(case, laps, [rows[-1][-1] for rows in losses])


def check_losses(case: Case, losses: Sequence[Sequence[tuple[float, ...]]]) -> None:
    """losses: of each contestant, of each of its laps. Every lap of those that learn the same against the first of them. Raises Unequal."""
    first: dict[str, tuple[str, tuple[float, ...]]] = {}
    for contestant, laps in zip(case.contestants, losses, strict=True):
        for lap in laps:
            name, want = first.setdefault(contestant.learns, (contestant.name, lap))
            if len(lap) != len(want) or not all(math.isclose(a, b, rel_tol=case.tolerance) for a, b in zip(lap, want, strict=True)):
                worst = next(
                    (pair for pair in zip(lap, want, strict=False) if not math.isclose(*pair, rel_tol=case.tolerance)),
                    (len(lap), len(want)),
                )
                raise Unequal(
                    f"{case.title}: {contestant.name} shows a loss of {worst[0]!r} where {name} has {worst[1]!r}, more than "
                    f"{case.tolerance:g} apart: they do not learn the same, so no time is told"
                )


def summarise(case: Case, laps: Sequence[Sequence[float]], losses: Sequence[float]) -> Result:
    """laps: of each contestant, seconds in the order of `turns`, round after round."""
    rounds = [[(a + b) / 2 for a, b in zip(seconds[::2], seconds[1::2], strict=True)] for seconds in laps]
    rows = []
    for i, contestant in enumerate(case.contestants):
        pair = (rounds[i], rounds[0]) if case.measure == "time" else (rounds[0], rounds[i])
        ratio = None if i == 0 else ratio_of_medians(*pair)
        rows.append(Row(contestant.name, list(laps[i]), rounds[i], statistics.median(rounds[i]), ratio, losses[i]))
    return Result(case, rows)


def ratio_of_medians(top_R: Sequence[float], bottom_R: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the medians over R rounds, and its 95 % percentile interval over resampled rounds (Efron 1979): a round is drawn for both
    at once, so that what slows down a whole round cancels. With few rounds the interval is too narrow."""
    values_2R = np.array([top_R, bottom_R])
    drawn_MR = np.random.default_rng(0).integers(0, values_2R.shape[1], (NUM_RESAMPLES, values_2R.shape[1]))
    top_M, bottom_M = np.median(values_2R[:, drawn_MR], axis=2)
    low, high = np.percentile(top_M / bottom_M, [2.5, 97.5])
    top, bottom = np.median(values_2R, axis=1)
    return float(top / bottom), float(low), float(high)


def verdict(result: Result) -> str:
    """The aim, and what was measured of it; empty where there is none."""
    aim = result.case.aim
    row = next((row for row in result.rows if aim is not None and row.name == aim.contestant), None)
    if aim is None or row is None or row.ratio is None:
        return ""
    value, low, high = row.ratio if aim.measure == result.case.measure else (1 / v for v in (row.ratio[0], row.ratio[2], row.ratio[1]))
    wanted = f"at most {aim.value:g} times its time" if aim.measure == "time" else f"at least {aim.value:g} times its speed"
    met = value <= aim.value if aim.measure == "time" else value >= aim.value
    return f"{aim.contestant}, {wanted}: {value:.2f} ({low:.2f} to {high:.2f}), {'reached' if met else 'not reached'}"


def show(result: Result) -> str:
    """A Markdown table, and below it the bound and the aim."""
    case, base = result.case, result.rows[0]
    unit, factor = ("s", 1.0) if case.num_steps is None else ("ms a step", 1000 / case.num_steps)
    head = f"| {case.title} | n | median, {unit} | least to most | {case.measure} against {base.name} (95 % interval) | last loss |"
    lines = [head, "|--|--:|--:|--:|--:|--:|"]
    for row in result.rows:
        ratio = "1" if row.ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*row.ratio)
        spread = f"{min(row.rounds) * factor:.3g} to {max(row.rounds) * factor:.3g}"
        lines.append(f"| {row.name} | {len(row.rounds)} | {row.median * factor:.3g} | {spread} | {ratio} | {row.loss:.5f} |")
    below = {"bound": case.bound, "aim": verdict(result)}
    return "\n".join([*lines, "", *(f"{name:6} {text}" for name, text in below.items() if text)]).rstrip()


def as_json(results: Iterable[Result], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything: n, raw times, medians, intervals, what it was measured on."""
    cases = []
    for result in results:
        case = {key: getattr(result.case, key) for key in ("title", "measure", "tolerance", "num_steps", "bound")}
        aim = None if result.case.aim is None else asdict(result.case.aim)
        rows = [asdict(row) for row in result.rows]
        cases.append({**case, "n": len(result.rows[0].rounds), "aim": aim, "verdict": verdict(result), "rows": rows})
    return {**about, "cases": cases}


def about(packages: Iterable[str]) -> dict[str, Any]:
    """What the figures were made with."""
    versions = {name: _version(name) for name in dict.fromkeys([*PACKAGES, *packages])}
    hardware = {"cpu": cpu_name(), "cpu_cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform()}
    return {"hardware": hardware, "versions": {"python": platform.python_version(), **versions}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The words that all timing commands know."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument(
        "--rounds", type=int, default=LEAST_ROUNDS, help=f"each contestant runs twice in each (default: {LEAST_ROUNDS}, the least)"
    )
    made.add_argument("--json", type=Path, help="also write everything into this file")
    made.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1, which small nets are quickest on)")
    made.add_argument("--smoke", action="store_true", help="everything in miniature, one round: shows that it works, and times nothing")
    return made


def command(
    made: argparse.ArgumentParser, cases: Callable[[argparse.Namespace], Iterable[Case]], words: Sequence[str] | None
) -> list[Result]:
    """Read the words, run the cases one after the other, show each as it stands. Ends the process with a message where losses differ."""
    given = made.parse_args(words)
    if given.rounds < LEAST_ROUNDS:
        made.error(f"--rounds is {given.rounds}; fewer than {LEAST_ROUNDS} say little, and --smoke is for trying it out")
    if given.threads < 1:
        made.error(f"--threads is {given.threads}; it must be at least 1")
    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        results, packages = [], []
        for case in cases(given):
            fair = replace(case, aim=None) if given.smoke else case
            result = run_case(fair, 1 if given.smoke else given.rounds, lambda text: print(text, file=sys.stderr, flush=True))
            packages += [package for contestant in case.contestants for package in contestant.also]
            results.append(result)
            print(show(result) + "\n", flush=True)
        command_line = " ".join([made.prog, *(sys.argv[1:] if words is None else words)])
        said = {"command": command_line, **about(packages)}
        print("\n".join(f"{key:9} {', '.join(f'{k} {v}' for k, v in said[key].items())}" for key in ("hardware", "versions")))
        if given.smoke:
            print("smoke: one round in miniature; these times say nothing")
        if given.json is not None:
            given.json.write_text(json.dumps(as_json(results, said), indent=1) + "\n", encoding="utf-8")
    except Unequal as error:
        sys.exit(str(error))
    finally:
        torch.set_num_threads(threads)
    return results
