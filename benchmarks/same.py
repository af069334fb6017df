"""Runs from stored features against the same runs computed online: equal bit for bit, whoever filled the store, killed or not."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import trials, world
from benchmarks.plants import own_rank, wrap
from benchmarks.world import Trial

CUTS = {"resnet-tiny": {"head": "head", "deeper": "layer3"}, "vit-tiny": {"head": "head", "deeper": "block.2"}}
STAGE = {"name": "one", "steps": 20, "lr": 0.01, "views": 4, "augment": "light", "eval_epochs": 1, "carry": "last"}
SHARD_ROWS = 32  # as few as there can be, so that small data fill many shards, the last one in part
START = {"timeout_minutes": 0.3}
MOST_KILLS, MOMENTS = 4, 12  # of one run; of the first few shards that a start writes


def recipe(backbone: str, cut: str, /, **changes: Any) -> dict[str, Any]:
    """One stage of four epochs behind a cut of CUTS, each in another view of 60 images."""
    return trials.recipe(**{"backbone": trials.NETS[backbone], "stages": [STAGE | {"unfreeze": CUTS[backbone][cut]}]} | changes)


def online(trial: Trial) -> Trial:
    """The same without stores."""
    return replace(trial, start=START | trial.start | {"cache": "never"})


def stored(trial: Trial, cache: Path, fault: str = "", *arguments: Any) -> Trial:
    """The same with everything stored in `cache`. fault: a function below, and its arguments."""
    return replace(trial, start=START | {"cache": "always"} | trial.start, before="same.prepare", arguments=(str(cache), fault, *arguments))


def shards_in(cache: Path) -> set[str]:
    """Store, name and checksum of every shard."""
    return {f"{path.parent.name}/{path.name}" for path in cache.glob("store/*/*.safetensors")}


def written(cache: Path) -> list[str]:
    """Every shard that was written, in order; what was written twice stands twice."""
    return (cache / "written").read_text().split() if (cache / "written").exists() else []


def asked(cache: Path) -> int:
    """How often a frozen network was asked for anything."""
    return (cache / "asked").stat().st_size if (cache / "asked").exists() else 0


# --- inside the processes of a world


def prepare(cache: str, fault: str = "", *arguments: Any) -> None:
    """Stores in `cache`, in small shards; what is written, and how often frozen networks are asked, is kept beside them."""
    from tltrain.cache import feature_table
    from tltrain.cache.disk_store import Store
    from tltrain.cache.frozen import FrozenModel

    os.environ["TLTRAIN_CACHE"] = cache
    os.makedirs(cache, exist_ok=True)
    feature_table.SHARD_ROWS = SHARD_ROWS

    def write(original: Any, self: Store, name: str, tensors: Any) -> Any:
        file = original(self, name, tensors)
        with open(f"{cache}/written", "a") as lines:
            lines.write(f"{self.path.name}/{name}\n")
        return file

    def ask(original: Any, *given: Any) -> Any:
        with open(f"{cache}/asked", "a") as calls:
            calls.write(".")
        return original(*given)

    wrap(Store, "write", write)
    wrap(FrozenModel, "__call__", ask)
    if fault:
        globals()[fault](*arguments)


def signal_in_fill(number: int, name: str, rank: int | None = None) -> None:
    """A signal at moment `number` of the fill to one rank alone, or to each."""
    if rank in (None, own_rank()):
        _at_moment(number, lambda: os.kill(os.getpid(), getattr(signal, name)))


def fill_disk(number: int, folder: str) -> None:
    """At moment `number` of the fill, fill the file system of `folder` with one file."""

    def fill() -> None:
        disk = os.statvfs(folder)
        with open(f"{folder}/ballast", "wb") as file:
            file.write(bytes(disk.f_bavail * disk.f_frsize))

    if own_rank() == 0:
        _at_moment(number, fill)


def use_bf16() -> None:
    """As the configurations for GPUs say."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"


def _at_moment(number: int, act: Callable[[], None]) -> None:
    """Three moments a shard: before it is written, with its temporary file on the disk, and renamed."""
    from tltrain.cache.disk_store import Store
    from tltrain.core import files

    count, writing = itertools.count(1), [False]

    def moment() -> None:
        if next(count) == number:
            act()

    def write(original: Any, *arguments: Any) -> Any:
        moment()
        writing[0] = True
        try:
            return original(*arguments)
        finally:
            writing[0] = False

    def sync(original: Any, path: Any) -> None:
        original(path)
        if writing[0]:
            moment()

    wrap(Store, "write", write)
    wrap(files, "sync", sync)


# --- what is compared


def killed_fill(trial: Trial, cache: Path, undisturbed: Path, kills: Sequence[tuple[int, int | None]]) -> tuple[int, list[str]]:
    """Kill a run in its fill, time and again, and let it end. kills: (moment, rank). Returns (kills that struck, what went wrong)."""
    struck, problems = 0, list[str]()
    for number, rank in kills:
        codes = world.run(stored(trial, cache, "signal_in_fill", number, "SIGKILL", rank))
        if -9 not in codes:  # fewer shards were missing, and it is finished
            break
        struck += 1
        problems += trials.unreadable(Path(trial.folder))
    whole = stored(trial, cache)
    codes = world.run(whole)
    if codes != [0] * trial.world:
        return struck, [*problems, f"exit codes {codes}: {world.log(whole)}"]
    twice = [name for name, times in Counter(written(cache)).items() if times > 1]
    problems += [f"{name} was written more than once" for name in twice]
    return struck, problems + [f"{d} differ" for d in trials.differences(Path(trial.folder), undisturbed)]


def shared_store(spec: dict[str, Any], folder: Path, num: int, num_seeds: int) -> list[str]:
    """Runs of several seeds, online and from one store, which the first one fills. Returns what went wrong."""
    problems, before = [], 0
    for seed in range(num_seeds):
        trial = Trial(spec | {"seed": seed}, str(folder / f"{seed}-online" / "run"), num)
        undisturbed = world.finish(online(trial))
        run = world.finish(stored(replace(trial, folder=str(folder / f"{seed}-stored" / "run")), folder / "cache"))
        problems += [f"seed {seed}: {d} differ" for d in trials.differences(run, undisturbed)]
        calls = asked(folder / "cache")
        if seed and calls != before:
            problems.append(f"seed {seed}: asked frozen networks {calls - before} times, though seed 0 had filled the store")
        before = calls
    if not shards_in(folder / "cache"):
        problems.append("nothing was stored")
    return problems


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds that share a store (default: 5)")
    parser.add_argument("--kills", type=int, default=20, help="kills in the fill, up to four of one run (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="draws them (default: 0)")
    arguments = parser.parse_args(words)
    began, num_bad, num_cases = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        # weights from a file: those of a seed would be another prefix for each
        starts = {
            name: world.finish(Trial(trials.recipe(backbone=trials.NETS[name], stages=[trials.HEAD]), f"{scratch}/{name}/run"))
            for name in CUTS
        }
        for name, cut, num in itertools.product(CUTS, ("head", "deeper"), (1, 2)):
            spec = recipe(name, cut, backbone={"weights": str(starts[name])})
            problems = shared_store(spec, Path(scratch) / f"{name}-{cut}-{num}", num, arguments.seeds)
            num_cases, num_bad = num_cases + 1, num_bad + bool(problems)
            of = f"{name:12} {cut:6} {num} process{'es' if num > 1 else '  '} {arguments.seeds} seeds"
            print(f"{of}: {'; '.join(problems) or 'equal, and only the first computed anything'}", flush=True)
        kills, wrong = _kills(Path(scratch), random.Random(arguments.seed), arguments.kills)
    seconds = time.monotonic() - began
    print(f"{num_cases} cases, {num_bad} that differ; {kills} kills, {wrong} runs that differ; seed {arguments.seed}, {seconds:.0f} s")
    raise SystemExit(num_bad + wrong > 0)


def _kills(scratch: Path, draw: random.Random, num_kills: int) -> tuple[int, int]:
    """(kills that struck, runs with problems)."""
    undisturbed: dict[tuple[str, int], Path] = {}
    struck = wrong = 0
    for number in itertools.count() if num_kills else ():
        name, num = draw.choice(list(CUTS)), draw.choice((1, 2))
        trial = Trial(recipe(name, "deeper"), str(scratch / f"kill-{number}" / "run"), num)
        if (name, num) not in undisturbed:
            whole = replace(trial, folder=str(scratch / f"undisturbed-{name}-{num}" / "run"))
            undisturbed[name, num] = world.finish(online(whole))
        ranks = [draw.choice((None, *range(num))) for _ in range(min(MOST_KILLS, num_kills - struck))]
        kills = [(draw.randint(1, MOMENTS), rank) for rank in ranks]
        times, problems = killed_fill(trial, scratch / f"kill-{number}" / "cache", undisturbed[name, num], kills)
        struck, wrong = struck + times, wrong + bool(problems)
        where = ", ".join(f"{moment} of {'all' if rank is None else f'rank {rank}'}" for moment, rank in kills[:times])
        print(
            f"{name:12} {num} process{'es' if num > 1 else '  '} killed at moment {where}: {'; '.join(problems) or 'ended equal'}",
            flush=True,
        )
        if struck >= num_kills:
            break
    return struck, wrong


if __name__ == "__main__":
    main()
