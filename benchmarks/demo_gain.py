"""What transfer gains over training from scratch: the demo's runs over several seeds, on the same test images."""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tltrain.commands import demo
from tltrain.commands.demo import Arm
from tltrain.core.recipe import Data
from tltrain.data import Split, open_images
from tltrain.data.sampler import derive_seed
from tltrain.data.splits import keep_per_class

NUM_RESAMPLES = 10_000
AGAINST = {"resnet": "resnet-scratch", "vit": "vit-scratch", "student": "student-alone"}
"""Family to its run from random weights."""


@dataclass(frozen=True)
class Row:
    """One arm over all seeds; accuracies are shares."""

    title: str
    top1: list[float]
    mean: float
    sd: float
    seconds: float
    against: str | None
    gain: tuple[float, float, float] | None
    """Mean of the paired differences to `against`, and the ends of its 95 % interval."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_gain", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1; each draws labelled images and new weights (default: 5)")
    parser.add_argument("--per-class", type=int, default=demo.PER_CLASS, help=f"labelled images of each digit (default: {demo.PER_CLASS})")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-gain"), help="folder of the runs (default: runs/demo-gain)")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds is {arguments.seeds}; a spread needs at least 2")
    out = arguments.out / f"{arguments.per_class}-of-each"
    train, test = draw_from(out)
    planned = [plan(out, train, test, seed, arguments.per_class) for seed in range(arguments.seeds)]
    console = Console(highlight=False, soft_wrap=True)
    with demo.one_thread():
        for seed, arms in enumerate(planned):
            with console.status(f"seed {seed}"):
                run_all(arms, out / f"seed-{seed}", seed)
            console.print(f"seed {seed}: {len(arms)} runs stand", markup=False)
    rows = summarise(planned, out)
    about = describe(out, arguments.seeds, arguments.per_class, len(test))
    file = out / "demo_gain.json"
    file.write_text(json.dumps({**about, "rows": {name: asdict(row) for name, row in rows.items()}}, indent=1) + "\n", encoding="utf-8")
    about_lines = [f"{name:10} {value}" for name, value in about.items()]
    print("\n".join([show(rows), "", f"{'ablation':10} {ablation(rows)}", *about_lines, f"{'figures':10} {file}"]))


def draw_from(out: Path) -> tuple[Split, Split]:
    """The images to draw labelled ones from, and the test images, the same for every seed; all as files in `out`/digits."""
    images = open_images(Data(source="digits", val_fraction=0, test_fraction=0.5))
    assert images.test is not None, "the fraction is above 0"
    (out / "digits").mkdir(parents=True, exist_ok=True)
    for split in (images.train, images.test):
        for position, number in enumerate(split.source_index):
            file = out / "digits" / f"{number:04d}.png"
            if not file.exists():
                split.read(position).save(file)
    return images.train, images.test


def plan(out: Path, train: Split, test: Split, seed: int, per_class: int) -> tuple[Arm, ...]:
    """The demo's runs on images drawn by `seed`, and beside them one full fine-tune of each net as long as its stages."""
    folder = out / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    table = folder / "digits.csv"
    labelled = keep_per_class(train.labels, per_class, derive_seed(seed, "labelled"))
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "split"])
        for split, positions in ((train, labelled), (test, range(len(test)))):
            writer.writerows([f"../digits/{split.source_index[i]:04d}.png", int(split.labels[i]), split.name] for i in positions)
    arms = demo.arms(demo.demo_data(0).model_copy(update={"source": f"csv:{table}", "per_class": None}), seed, folder)
    full = {"resnet": demo.stage("all", "all", 100, 3e-4, 0.7), "vit": demo.stage("all", "all", 100, 1e-3, 0.7, "light")}
    more = []
    for arm in arms:
        family, _, how = arm.recipe.name.partition("-")
        if how == "stages":
            title = arm.title.replace("in stages", "all at once")
            recipe = arm.recipe.model_copy(update={"name": f"{family}-full", "purpose": title, "stages": (full[family],)})
            more.append(Arm(title, recipe))
    return (*arms, *more)


def run_all(arms: Sequence[Arm], folder: Path, seed: int) -> None:
    """Train what is not finished yet."""
    for arm in arms:
        outcome, said = demo.run_quietly(arm.recipe, arm.path(folder))
        if outcome != "finished":
            raise SystemExit(f"seed {seed}, {arm.title}: {outcome}: {said}")


def summarise(planned: Sequence[Sequence[Arm]], out: Path) -> dict[str, Row]:
    """Run name to its row, each net's runs together."""
    figures = {arm.recipe.name: [demo.read_figures(arm.path(out / f"seed-{seed}")) for seed in range(len(planned))] for arm in planned[0]}
    rows = {}
    for arm in sorted(planned[0], key=lambda arm: list(AGAINST).index(arm.recipe.name.partition("-")[0])):
        name = arm.recipe.name
        against = AGAINST[name.partition("-")[0]]
        top1, base = [f["top1"] for f in figures[name]], [f["top1"] for f in figures[against]]
        seconds = statistics.mean(f["seconds"] for f in figures[name])
        gain = None if name == against else bootstrap([a - b for a, b in zip(top1, base, strict=True)])
        spread = statistics.stdev(top1)
        rows[name] = Row(arm.title, top1, statistics.mean(top1), spread, seconds, None if name == against else against, gain)
    return rows


def bootstrap(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the 95 % percentile interval of the mean over resampled seeds (Efron 1979); with few seeds it is too narrow."""
    values_N = np.array(differences)
    drawn_RN = np.random.default_rng(0).choice(values_N, (NUM_RESAMPLES, len(values_N)))
    low, high = np.percentile(drawn_RN.mean(axis=1), [2.5, 97.5])
    return float(values_N.mean()), float(low), float(high)


def describe(out: Path, num_seeds: int, per_class: int, num_test: int) -> dict[str, Any]:
    """What the figures were made with."""
    environment = json.loads((out / "seed-0" / "resnet-scratch" / "env.json").read_text(encoding="utf-8"))
    versions = environment["versions"]
    return {
        "labels": f"{per_class} of each digit, {per_class * demo.NUM_CLASSES} in all, drawn anew by each of {num_seeds} seeds",
        "test": f"the same {num_test} images for every seed",
        "hardware": f"{cpu_name()}, one thread of {os.cpu_count()} cores",
        "versions": ", ".join(
            f"{name} {versions[name]}" for name in ("tltrain", "python", "torch", "torchvision", "transformers", "numpy")
        ),
    }


def cpu_name() -> str:
    """As Linux calls it; elsewhere the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else os.uname().machine


def show(rows: dict[str, Row]) -> str:
    """A Markdown table: percent of the test images; differences are paired by seed."""
    lines = ["| run | n | top-1, mean | sd | gain over scratch (95 % interval) |", "|--|--:|--:|--:|--:|"]
    for row in rows.values():
        gain = interval(row.gain) if row.gain else ""
        lines.append(f"| {row.title} | {len(row.top1)} | {100 * row.mean:.1f} | {100 * row.sd:.1f} | {gain} |")
    return "\n".join(lines)


def ablation(rows: dict[str, Row]) -> str:
    """What stages give over one fine-tune of all blocks that is as long, paired by seed."""
    said = []
    for name, row in rows.items():
        if name.endswith("-stages"):
            full = rows[name.replace("-stages", "-full")]
            said.append(f"{row.title} - {full.title}: {interval(bootstrap([a - b for a, b in zip(row.top1, full.top1, strict=True)]))}")
    return "; ".join(said)


def interval(gain: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in gain)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main()
