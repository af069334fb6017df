"""Small real runs, what is done to them, and whether they end equal: shared by the tests and by the commands beside this file."""

from __future__ import annotations

import functools
import json
import os
import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import world
from benchmarks.world import Trial
from tltrain.core.recipe import validate
from tltrain.runs import checkpoint
from tltrain.runs.metrics_log import read_rows

NETS: dict[str, dict[str, Any]] = {
    "resnet-tiny": {"weights": "shipped:resnet-tiny-printed"},
    "vit-tiny": {"weights": "shipped:vit-tiny-printed"},
}
"""Pretrained: in a few steps they learn something. From random weights the best stayed the head of zeros that a run begins with."""
EVERY_STEP = {"save_steps": 1, "keep": 100}
"""The flags of a run that keeps a checkpoint of every step."""
CLOCKS = {"time", "seconds", "images_per_s"}
HEAD = {"name": "head", "unfreeze": "head", "steps": 4, "lr": 0.01, "carry": "last", "eval_epochs": 0.4}
MIDDLE = {"name": "mid", "unfreeze": "layer3", "steps": 4, "lr": 0.002, "clip": 0.5, "augment": "light", "eval_epochs": 0.4}
LAST = {"name": "all", "unfreeze": "all", "steps": 4, "lr": 0.05, "optimizer": "sgd", "carry": "last", "eval_epochs": 0.4}


@functools.cache
def seed() -> int:
    """What this start of a program draws from: TLTRAIN_SEED, or another number each time. Print it with what fails."""
    return int(os.environ.get("TLTRAIN_SEED") or secrets.randbelow(10**6))


def recipe(**changes: Any) -> dict[str, Any]:
    """Three stages of four steps on 60 images, evaluated at every other step. `changes` replace top-level keys."""
    data = {"source": "digits", "size": 32, "resize": 32, "per_class": 6, "flip": False, "eval_limit": 20}
    raw = {"name": "trial", "batch": 12, "data": data, "backbone": NETS["resnet-tiny"], "stages": [HEAD, MIDDLE, LAST]}
    return validate(raw | changes, "trial").model_dump(mode="json")


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run without clocks and rates."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_rows(run)]


def differences(run: Path, undisturbed: Path) -> list[str]:
    """In what a finished run differs from one that was never disturbed; empty when it is equal, bit for bit."""
    found = [] if world.outcome(run)["outcome"] == "finished" else ["the outcome"]
    if rows_of(run) != rows_of(undisturbed):
        found.append("the metrics rows")
    found += [f"{name} is missing" for name in ("report.html", "test_metrics.json", "plan.txt") if not (run / name).exists()]
    for path in sorted(undisturbed.rglob("weights.safetensors")):
        name = path.relative_to(undisturbed)
        if "checkpoints" not in path.parts and not _same(load_file(run / name), load_file(path)):
            found.append(str(name))
    ours, theirs = (checkpoint.load(checkpoint.committed(folder / "checkpoints")[0]) for folder in (run, undisturbed))
    if (ours.progress.order, ours.progress.best) != (theirs.progress.order, theirs.progress.best):
        found.append("the last checkpoint's progress")
    if not _same(ours.weights, theirs.weights) or not _same(ours.best or {}, theirs.best or {}):
        found.append("the last checkpoint's weights")
    return found


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def distance(run: Path, other: Path) -> float:
    """The largest relative difference of the final weights: of each tensor, against its norm.

    A key projection's bias has no gradient but rounding (softmax takes no notice of it), and stays near 1e-14: it counts as zero.
    """
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (run, other))
    floats = [name for name, tensor in theirs.items() if tensor.is_floating_point()]
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-4)).item() for name in floats)


def unreadable(run: Path) -> list[str]:
    """What in a run folder cannot be read, however the run ended; every committed checkpoint must be whole."""
    if not run.exists():
        return []
    found = [f"{path.name}: {problem}" for path in checkpoint.committed(run / "checkpoints") if (problem := checkpoint.verify(path))]
    for path in (*run.glob("*.json"), *run.glob("stages/*/weights.safetensors"), *run.glob("weights.safetensors")):
        try:
            json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
        except Exception as error:
            found.append(f"{path.relative_to(run)}: {type(error).__name__}: {error}")
    read_rows(run)
    return found


def position(run: Path) -> tuple[int, int, bool]:
    """Where the newest checkpoint stands; before everything where there is none."""
    standing = checkpoint.committed(run / "checkpoints")
    return checkpoint.load(standing[0]).progress.order if standing else (-1, 0, False)


class References:
    """Runs that nobody disturbs, one for each number of processes, made when they are asked for."""

    def __init__(self, folder: Path, start: dict[str, Any], spec: dict[str, Any] | None = None) -> None:
        self.folder, self.start, self.spec = folder, start, spec or recipe()
        self.seconds: dict[int, float] = {}

    def __call__(self, num: int) -> Path:
        folder = self.folder / f"{num}" / "run"
        if num not in self.seconds:
            began = time.monotonic()
            world.finish(Trial(self.spec, str(folder), num, start=self.start))
            self.seconds[num] = time.monotonic() - began
        return folder


# --- a checkpoint that is damaged


@dataclass(frozen=True)
class Damage:
    """One bit of a file flipped, or its end cut off."""

    file: str
    bit: int | None
    length: int | None

    def __str__(self) -> str:
        return f"{self.file}: " + (f"bit {self.bit} flipped" if self.length is None else f"cut to {self.length} bytes")


def damages(folder: Path, num_flips: int, num_cuts: int, seed: int) -> Iterator[Damage]:
    """Random damage, the same number of times to each file of a checkpoint."""
    draw, files = random.Random(seed), sorted(path for path in folder.iterdir())
    for i in range(num_flips):
        file = files[i % len(files)]
        yield Damage(file.name, draw.randrange(8 * file.stat().st_size), None)
    for i in range(num_cuts):
        file = files[i % len(files)]
        yield Damage(file.name, None, draw.randrange(file.stat().st_size))


def overlooked(folder: Path, damage: Damage) -> list[str]:
    """Damage the newest checkpoint of a folder, look for the newest valid one, and mend everything. Returns what went wrong."""
    newest, older = checkpoint.committed(folder)[:2]
    file, aside = newest / damage.file, newest.with_name(f"damaged-{newest.name}")
    said: list[str] = []
    whole = file.read_bytes()
    spoilt = bytearray(whole[: damage.length])
    if damage.bit is not None:
        spoilt[damage.bit // 8] ^= 1 << damage.bit % 8
    file.write_bytes(spoilt)
    found = [] if checkpoint.verify(newest) else [f"{damage}: not seen"]
    taken = checkpoint.newest(folder, said.append)
    if taken != older or not aside.is_dir() or not any(newest.name in line and aside.name in line for line in said):
        found.append(f"{damage}: took {taken}, said {said}")
    if aside.is_dir():
        aside.rename(newest)
    file.write_bytes(whole)
    return found


# --- a run that is killed


@dataclass(frozen=True)
class Killed:
    """What became of a run that was killed, and where."""

    places: tuple[str, ...]
    problems: tuple[str, ...]


class Moments:
    """When to kill: random moments of a start, whose length is learnt from those that ended before they were killed."""

    def __init__(self, draw: random.Random, span_s: float) -> None:
        self.draw, self.longest_s, self.span_s = draw, span_s, span_s / 2  # half of it is the start

    def wait_s(self) -> float:
        return self.draw.uniform(0, self.span_s)

    def learn(self, came_too_late: bool) -> None:
        self.span_s = 0.7 * self.span_s if came_too_late else min(1.1 * self.span_s, self.longest_s)


def killed_run(trial: Trial, undisturbed: Path, num_kills: int, moments: Moments) -> Killed:
    """Kill a run at up to `num_kills` random moments, then let it end.

    In a world of several, every other kill takes one process, and the others must end by themselves.
    """
    run, reached = Path(trial.folder), (-1, 0, False)
    places: list[Any] = []
    problems: list[str] = []
    traced = replace(trial, before="trace_places", arguments=(str(run.parent),))
    while len(places) < num_kills:
        draw = moments.draw
        victims = range(trial.world) if trial.world == 1 or draw.random() < 0.5 else [draw.randrange(trial.world)]
        place = _kill_once(traced, victims, moments.wait_s())
        moments.learn(came_too_late=place is None)
        if place is None:  # it was quicker than the kill, and the run is finished
            break
        places.append(place + ("" if len(victims) == trial.world else f", rank {victims[0]} alone"))
        problems += [f"{places[-1]}: {problem}" for problem in unreadable(run)]
        if position(run) < reached:
            problems.append(f"{places[-1]}: fell back from {reached} to {position(run)}")
        reached = max(reached, position(run))
    codes = world.run(trial)
    if codes != [0] * trial.world:
        return Killed(tuple(places), (*problems, f"after {places}: exit codes {codes}: {world.log(trial)}"))
    return Killed(tuple(places), (*problems, *(f"after {places}: {d} differ" for d in differences(run, undisturbed))))


def _kill_once(trial: Trial, victims: Any, wait_s: float) -> str | None:
    """Start a trial and kill some of its processes `wait_s` after its first sign; where they were, or None if it had ended."""
    traces = [Path(trial.folder).parent / f"place.rank{rank}" for rank in victims]
    for trace in traces:
        trace.unlink(missing_ok=True)
    processes = world.begin(trial)
    while not traces[0].exists() and processes[victims[0]].exitcode is None:
        time.sleep(0.005)
    time.sleep(wait_s)
    ended = all(process.exitcode is not None for process in processes)
    for rank in victims:
        processes[rank].kill()
    world.join(trial, processes)
    return None if ended else traces[0].read_text().strip() or "start"
