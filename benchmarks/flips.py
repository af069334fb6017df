"""Damages a checkpoint, one bit or one cut at a time, in every file of it: each must be seen and stepped over."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import trials, world
from benchmarks.world import Trial
from tltrain.runs import checkpoint


def two_checkpoints(run: Path, folder: Path) -> Path:
    """Copy two checkpoints from the middle of a run that kept all, those with every kind of file, to `folder`."""
    full = [path for path in checkpoint.committed(run / "checkpoints") if len(list(path.iterdir())) == 5]
    for path in full[:2]:
        shutil.copytree(path, folder / path.name)
    return folder


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flips", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="flipped bits; a fifth as many cuts come on top (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="draws them (default: 0)")
    arguments = parser.parse_args(words)
    began, damaged, missed = time.monotonic(), Counter[str](), []
    with tempfile.TemporaryDirectory() as scratch:
        run = world.finish(Trial(trials.recipe(), f"{scratch}/run", start=trials.EVERY_STEP))
        folder = two_checkpoints(run, Path(scratch) / "two")
        sizes = {path.name: path.stat().st_size for path in checkpoint.committed(folder)[0].iterdir()}
        for damage in trials.damages(checkpoint.committed(folder)[0], arguments.trials, arguments.trials // 5, arguments.seed):
            damaged[damage.file] += 1
            missed += trials.overlooked(folder, damage)
    for name, size in sorted(sizes.items()):
        print(f"{name:20} {size:9,} bytes, damaged {damaged[name]} times")
    print(*missed, sep="\n", end="\n" if missed else "")
    flips, cuts = arguments.trials, arguments.trials // 5
    print(f"{flips} flipped bits and {cuts} cuts, {len(missed)} missed, seed {arguments.seed}, {time.monotonic() - began:.0f} s")
    raise SystemExit(len(missed) > 0)


if __name__ == "__main__":
    main()
