"""Images a second and memory of each source: through our loader, and through that format's own library and torch's DataLoader, in turns.

Both sides decode the same small JPEGs, resize and crop them with Pillow, and give batches in a shuffled order, in one process with one
thread and no data workers. No time is told unless the pixels with their labels were the same. Times are of the CPU: the files lie in the
kernel's cache, and other work on the machine counts less. The two sides of a source are a process each, so that the peak of memory, of one
start and one epoch, is of one side. What comes before the first image is timed apart: ours at the first start, which decodes and checks
each image, and at a later one; theirs when it is opened.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.source_formats import BATCH, FORMATS, RESIZE, SIDE, SIZE, Batches, pictures
from benchmarks.timing import LEAST_ROUNDS, Unequal, about, ratio_of_medians, turns
from tltrain.core.recipe import Data
from tltrain.data import open_images
from tltrain.data.loader import train_loader
from tltrain.data.sampler import SampleStream, Shard
from tltrain.data.views import Preprocess, Views

SIDES = ("ours", "theirs")
ROOT = Path(__file__).resolve().parents[1]


def main(words: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sources", description=__doc__)
    parser.add_argument("--images", type=int, default=2048, help=f"a multiple of {BATCH} (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help="each side runs two epochs in each (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(FORMATS), default=list(FORMATS), metavar="SOURCE", help=", ".join(FORMATS))
    parser.add_argument("--smoke", action="store_true", help="few images, one round")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    given = parser.parse_args(words)
    if given.images % BATCH:
        parser.error(f"--images is {given.images}; give a multiple of {BATCH}, so that an epoch is whole batches")
    num, rounds = (2 * BATCH, 1) if given.smoke else (given.images, given.rounds)
    rows: list[dict[str, Any]] = []
    print(head(num, rounds), flush=True)
    for name in given.only:
        if missing := FORMATS[name].missing():
            print(f"not measured: {name}, since {missing} is not here", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"source": name, **measure(name, Path(folder), num, rounds)})
        print(line(rows[-1]), flush=True)  # each as it is known
    made = about(["pillow", *filter(None, (FORMATS[name].package for name in given.only))])
    print("\n" + "\n".join(f"{key:9} {', '.join(f'{k} {v}' for k, v in made[key].items())}" for key in ("hardware", "versions")))
    if given.json is not None:
        given.json.write_text(json.dumps({**made, "images": num, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return rows


def measure(name: str, folder: Path, num: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of each lap of both sides, and their memory. Raises Unequal where they give other images or labels."""
    FORMATS[name].write(folder, pictures(num))
    laps: dict[str, dict[str, list[float]]] = {"ours": {"first": [], "later": [], "epoch": []}, "theirs": {"first": [], "epoch": []}}
    with closing(_Side("ours", name, folder)) as ours, closing(_Side("theirs", name, folder)) as theirs:
        sides = {"ours": ours, "theirs": theirs}
        seen = {side: process.ask("epoch")["seen"] for side, process in sides.items()}  # warms up
        memory = {side: process.ask("memory") for side, process in sides.items()}
        if seen["theirs"] != seen["ours"]:
            raise Unequal(f"{name}: ours gives {seen['ours']}, theirs {seen['theirs']}: other images or labels, so no time is told")
        for _ in range(rounds):
            for lap, i in enumerate(turns(len(SIDES))):
                side = SIDES[i]
                for what in laps[side] if lap < len(SIDES) else ["epoch"]:
                    answer = sides[side].ask(what)
                    laps[side][what].append(answer["cpu_s"])
                    assert answer.get("seen", seen[side]) == seen[side], f"{name}: {side} gives another epoch than before"
        return {"num": num, **{side: {**laps[side], **memory[side]} for side in SIDES}}


class _Side:
    """A process that runs a lap of one side when it is asked to."""

    def __init__(self, side: str, name: str, folder: Path) -> None:
        code = "import sys; from benchmarks.sources import serve; serve(*sys.argv[1:])"
        command = [sys.executable, "-c", code, side, name, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, f"the process of a side has ended: {self.process.args!r}"
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        self.process.communicate()


def serve(side: str, name: str, folder: str) -> None:
    """Answer the questions on the input until it ends: `first`, `later`, `epoch`, `memory`."""
    torch.set_num_threads(1)
    if FORMATS[name].package:
        import_module(FORMATS[name].package)
    before_mb, root = _peak_mb(), Path(folder)
    epoch: Callable[[], Batches] | None = None
    cache = tempfile.mkdtemp(dir=folder)
    for question in sys.stdin:
        what = question.strip()
        if what == "memory":
            print(json.dumps({"mb": _peak_mb(), "before_mb": before_mb}), flush=True)
            continue
        if what == "first":
            cache = tempfile.mkdtemp(dir=folder)
        with mock.patch.dict(os.environ, {"TLTRAIN_CACHE": cache}):
            found: dict[str, Any] = {}
            began = time.process_time()
            if what != "epoch" or epoch is None:
                epoch = None  # LMDB opens no database twice
                epoch = opened(side, name, root)
                found = {"cpu_s": time.process_time() - began}
            if what == "epoch":
                began = time.process_time()
                found = {"seen": summed(epoch()), "cpu_s": time.process_time() - began}
        print(json.dumps(found), flush=True)


def opened(side: str, name: str, root: Path) -> Callable[[], Batches]:
    """What gives an epoch of batches: of theirs, or of our own loader."""
    made = FORMATS[name]
    if side == "theirs":
        return made.theirs(root)
    data = Data(source=made.source.format(root), val_fraction=0, test_fraction=0)
    split = open_images(data, root).train

    def epoch() -> Batches:
        views = Views(split, Preprocess(SIZE, RESIZE), "none", False, 0)  # anew: it keeps what it has decoded
        stream = SampleStream(0, 0, len(split), BATCH, None, 0)
        batches = train_loader(views, stream, 0, len(split) // BATCH, Shard(), 0, pin=False)
        return ((batch["image"], batch["label"]) for batch in batches)

    return epoch


def summed(batches: Batches) -> list[int]:
    """What tells whether two epochs were of the same pixels and labels, in whatever order: their number, and sums of integers."""
    total = [0, 0, 0]
    for image_BCHW, label_B in batches:
        pixels_B = image_BCHW.flatten(1).sum(1, dtype=torch.int64)
        total[0] += len(pixels_B)
        total[1] += int((pixels_B**2).sum())
        total[2] += int((pixels_B * (label_B + 1)).sum())
    return total


def _peak_mb() -> float:
    """The most memory that this process ever had, MB. Files that it maps count where their pages were read."""
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def paired(seconds: Sequence[float]) -> list[float]:
    """Each round's mean of its two laps."""
    return [(a + b) / 2 for a, b in zip(seconds[::2], seconds[1::2], strict=True)]


def head(num: int, rounds: int) -> str:
    speed = "images a CPU second (range)"
    titles = ("source", speed, "beside it", speed, "our time against it (95 % interval)", "first start, s", "later start, s", "it opens, s",
              "peak MB", "its peak MB")  # fmt: skip
    above = f"{num:,} JPEGs of {SIDE} px to {SIZE} px, batches of {BATCH}; n = {rounds} rounds of two epochs"
    return f"{above}\n\n| {' | '.join(titles)} |\n|--|--:|--|{'--:|' * (len(titles) - 3)}"


def line(row: dict[str, Any]) -> str:
    """A line of the Markdown table: medians."""
    ours, theirs = (row[side] for side in SIDES)

    def speed(side: dict[str, Any]) -> str:
        per_s = [row["num"] / seconds for seconds in paired(side["epoch"])]
        return f"{statistics.median(per_s):,.0f} ({min(per_s):,.0f} to {max(per_s):,.0f})"

    ratio = "{:.2f} ({:.2f} to {:.2f})".format(*ratio_of_medians(paired(ours["epoch"]), paired(theirs["epoch"])))
    starts = [f"{statistics.median(seconds):.2f}" for seconds in (ours["first"], ours["later"], theirs["first"])]
    peaks = [f"{side['mb'] - side['before_mb']:.0f}" for side in (ours, theirs)]
    cells = [f"`{row['source']}`", speed(ours), FORMATS[row["source"]].reader, speed(theirs), ratio, *starts, *peaks]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        main()
    except Unequal as error:
        sys.exit(str(error))
