"""What a million image files take at the first and at a later start, in time and memory: against torchvision's ImageFolder and os.walk.

The files are hard links to small JPEGs, in a folder of their own. Each lap is a process of its own; laps go in turns. The first start is
measured on fewer files, since it decodes each. The record that a later start reads is written as a first start would: with a hash for each
file as if it had bytes of its own, so that splits are cut image by image, which is the longer way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.demo_gain import cpu_name
from tltrain.core.recipe import Data
from tltrain.data import open_images
from tltrain.data.scans import record
from tltrain.data.scans.found import Found
from tltrain.data.scans.record import Record
from tltrain.data.sources import scan

PICTURES = 12
"""Different pictures of a class: a group of identical ones is never parted, and each split needs some."""
CHILD = """
import json, os, re, sys, time
from pathlib import Path
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
what, folder = sys.argv[1:]
if what == "walk":
    def work(): return sum(len([f"{place}/{name}" for name in names]) for place, _, names in os.walk(folder))
elif what == "imagefolder":
    from torchvision.datasets import ImageFolder
    def work(): return len(ImageFolder(folder))
else:
    from tltrain.core.recipe import Data
    from tltrain.data import open_images
    def work():
        images = open_images(Data(source=f"csv:{folder}.csv" if what == "csv" else f"folder:{folder}"))
        return len(images.source.ids)
before, began, used = peak(), time.monotonic(), time.process_time()
num = work()
print(json.dumps({"num": num, "s": time.monotonic() - began, "cpu_s": time.process_time() - used, "mb": peak(), "before_mb": before}))
"""
TITLES = {
    "first": "tltrain, first start", "later": "tltrain, later start", "csv": "tltrain, later start of a CSV",
    "imagefolder": "torchvision ImageFolder", "walk": "os.walk",
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scan", description=__doc__)
    parser.add_argument("--images", type=int, default=1_280_000, help="files of a later start (default: %(default)s)")
    parser.add_argument("--first", type=int, default=20_000, help="files of a first start (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are made, or were made before (default: a folder that is deleted)")
    parser.add_argument("--smoke", action="store_true", help="a few files, one round")
    given = parser.parse_args(words)
    if given.smoke:
        given.images, given.first, given.classes, given.rounds = 480, 240, 2, 1
    with tempfile.TemporaryDirectory() as temporary:
        laps = measure(given.folder or Path(temporary), given.images, given.first, given.classes, given.rounds)
    print(show(laps, given.rounds))
    return laps


def measure(folder: Path, num_images: int, num_first: int, num_classes: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """The laps of each contestant."""
    few, many = (make(folder, num, num_classes) for num in (num_first, num_images))
    (folder / "cache").mkdir(exist_ok=True)
    with mock.patch.dict(os.environ, {"TLTRAIN_CACHE": str(folder / "cache")}):
        write_records(many)
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in TITLES}
    for turn in range(rounds):
        for name in sorted(TITLES, reverse=turn % 2 == 1):
            cache = tempfile.mkdtemp(dir=folder) if name == "first" else str(folder / "cache")
            command = [sys.executable, "-c", CHILD, name, str(few if name == "first" else many)]
            environment = os.environ | {"TLTRAIN_CACHE": cache}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            laps[name].append(json.loads(done.stdout))
    nums = {name: {lap["num"] for lap in found} for name, found in laps.items()}
    assert all(num == {num_first if name == "first" else num_images} for name, num in nums.items()), nums
    return laps


def make(folder: Path, num: int, num_classes: int) -> Path:
    """A folder of hard links to PICTURES JPEGs a class, and a CSV beside it that lists them. Made before, it is taken as it is."""
    root = folder / f"images-{num}"
    if root.with_name(f"{root.name}.csv").exists():
        return root
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    rows = ["path,label\n"]
    for k in range(num_classes):
        label = f"n{k:08}"
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(num // num_classes):
            picture, name = pictures / f"{k}-{i % PICTURES}.jpg", f"{label}/{label}_{i:06}.JPEG"
            if not picture.exists():
                pixels = np.random.default_rng([k, i % PICTURES]).integers(0, 256, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(picture)
            os.link(picture, root / name)
            rows.append(f"{root.name}/{name},{label}\n")
    root.with_name(f"{root.name}.csv").write_text("".join(rows))
    return root


def write_records(root: Path) -> None:
    """What first starts of this folder and of its CSV would have left."""

    def complete(cache: Path, now: Record, known: object, row_N: np.ndarray, white: object, check: object) -> Found:
        num, none_N = len(now.paths), np.zeros(len(now.paths), np.int32)
        digest_NB = np.frombuffer(np.random.default_rng(0).bytes(16 * num), np.uint8).reshape(num, 16)
        found = Found(digest_NB, none_N, none_N, none_N - 1, np.ones(num, bool))
        record.replace(cache, now.part(np.arange(num), found))
        return found

    with mock.patch.object(scan, "_complete", complete):
        for source in (f"folder:{root}", f"csv:{root}.csv"):
            open_images(Data(source=source))


def show(laps: dict[str, list[dict[str, float]]], rounds: int) -> str:
    """A Markdown table: medians, the range of the seconds, and the ratio to ImageFolder in the same round."""
    lines = [
        f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}; n = {rounds}",
        "",
        "| | files | seconds (range) | CPU seconds | files a second | peak MB beyond imports | of ImageFolder's time a file |",
        "|--|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in laps.items():
        seconds, num = [lap["s"] for lap in found], int(found[0]["num"])
        pairs = zip(found, laps["imagefolder"], strict=True)
        ratio = statistics.median(lap["s"] / lap["num"] / (other["s"] / other["num"]) for lap, other in pairs)
        cpu_s, peak_mb = statistics.median(lap["cpu_s"] for lap in found), statistics.median(lap["mb"] - lap["before_mb"] for lap in found)
        middle = statistics.median(seconds)
        lines.append(
            f"| {TITLES[name]} | {num:,} | {middle:.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | {cpu_s:.1f} | {num / middle:,.0f} | "
            f"{peak_mb:.0f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
