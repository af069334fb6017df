"""What `tltrain fit` gives on a folder of pictures, against recipes of ours, a solved head, fastai and timm. Over splits, paired.

    python -m benchmarks.fit_gain pictures --weights efficientnet-lite0-57934424.pth --fastai-python fastai/bin/python

Each contestant is a process of one thread, learns from the same files and weights, and is scored on the same test images. One that is
finished is not run again; one that was stopped begins anew, since its time counts.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import jobs
from benchmarks.demo_gain import bootstrap, interval
from benchmarks.evidence import describe
from tltrain.commands.demo import read_figures
from tltrain.core import files
from tltrain.core import recipe as recipes
from tltrain.core.recipe import Backbone, Data, Recipe, validate
from tltrain.data import open_images
from tltrain.models import weights

NAME = "timm:tf_efficientnet_lite0"
FIT = "fit"
EPOCHS = 5 + 5 + 15
"""Of the stages of folder-resnet50. Outside contestants see as many images."""


@dataclass(frozen=True)
class Task:
    """What one contestant learns."""

    images: Path
    """train, val and test, each with a folder for each class."""
    weights: Path
    """A state dict under timm's names."""
    folder: Path
    """The contestant's own."""
    seed: int

    @property
    def num_train(self) -> int:
        return len([*self.images.glob("train/*/*")])


@dataclass(frozen=True)
class Contestant:
    """Who takes part."""

    title: str
    command: Callable[[Task], Sequence[str]]
    read: Callable[[Path], dict[str, Any]]
    """From its folder: top1 on the test images (0 to 1), and whatever else is worth keeping."""


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit_gain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path, help="a folder with one subfolder a class, such as benchmarks.pictures makes")
    parser.add_argument("--weights", type=Path, required=True, help=f"a file of weights for {NAME}")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1, of the split and of all that is drawn (default: 5)")
    parser.add_argument("--minutes", type=float, default=5.0, help="for fit (default: 5)")
    parser.add_argument("--fastai-python", metavar="PATH", help="a Python that has fastai and timm (default: fastai takes no part)")
    parser.add_argument("--timm-script", type=Path, metavar="PATH", help="timm's train.py (default: timm takes no part)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"run these alone: {', '.join(contestants(5, 'x', Path()))}")
    jobs.add_to(parser, "contestants")
    parser.add_argument("--out", type=Path, default=Path("runs/fit-gain"), help="folder of everything (default: runs/fit-gain)")
    arguments = parser.parse_args(words)
    taking_part = contestants(arguments.minutes, arguments.fastai_python, arguments.timm_script)
    unknown = [name for name in arguments.only or () if name not in taking_part]
    if unknown:
        parser.error(f"--only is {unknown[0]}, which takes no part; there are: {', '.join(taking_part)}")
    if arguments.seeds < 2:
        parser.error(f"--seeds is {arguments.seeds}; a spread needs at least 2")
    out = arguments.out.absolute()
    prepare(arguments.pictures, arguments.weights, out)
    names, images = arguments.only or [*taking_part], [split(out, seed) for seed in range(arguments.seeds)]
    tasks = [(name, Task(each, out / "weights.pth", each.with_name(name), seed)) for seed, each in enumerate(images) for name in names]
    jobs.at_once([partial(finished, taking_part[name], task) for name, task in tasks], arguments.jobs)
    print(report(out, taking_part, arguments.seeds, arguments.jobs))


def finished(contestant: Contestant, task: Task) -> None:
    """Run a contestant, unless its result stands beside its folder, and write that."""
    result = task.folder.with_name(f"{task.folder.name}.json")
    if not result.exists():
        found = run(contestant, task)
        files.write_atomic(result, json.dumps(found, indent=1) + "\n")
        print(f"seed {task.seed}, {contestant.title}: {found}", flush=True)


def contestants(minutes: float, fastai: str | None, timm: Path | None) -> dict[str, Contestant]:
    """Name, which is that of its folder, to contestant. Those of other libraries take part where it is said where they are."""
    found = {
        FIT: Contestant(f"fit, {minutes:g} minutes", lambda task: _fit(task, minutes), _of_fit),
        "ridge": Contestant("ridge on the frozen network", lambda task: _train(task, probe_of(small())), _of_run),
        "folder-small": Contestant("folder-small", lambda task: _train(task, small()), _of_run),
    }
    if fastai is not None:
        found["fastai"] = Contestant("fastai's fine_tune", lambda task: _fastai(task, fastai), _of_fastai)
    found["folder"] = Contestant("folder-resnet50's stages", lambda task: _train(task, plain()), _of_run)
    if timm is not None:
        found["timm"] = Contestant("timm's train.py", lambda task: _timm(task, timm), _of_timm)
    return found


def prepare(pictures: Path, file: Path, out: Path) -> None:
    """Write the pictures as tltrain decodes them, so that transparency is the same for all, and the weights under timm's names."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "weights.pth").exists():
        source = weights.find(Backbone(name=NAME, weights=str(file)), network=False)
        assert source.read is not None, "a file was given"
        torch.save(source.read(), out / "weights.pth")
    write_pictures(pictures, out)


def write_pictures(pictures: Path, out: Path) -> None:
    """The part of `prepare` that is of pictures."""
    images = open_images(Data(source=f"folder:{pictures}", val_fraction=0, test_fraction=0)).train
    for place, name in enumerate(images.ids):
        target = out / "pictures" / (name if name.endswith(".png") else f"{name}.png")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            images.read(place).save(target)


def split(out: Path, seed: int) -> Path:
    """The folder of the images as the data seed parts them, made where it is absent. Files are links."""
    images = open_images(Data(source=f"folder:{out / 'pictures'}", seed=seed))
    folder = out / f"seed-{seed}" / "images"
    for each in (images.train, images.val, images.test):
        assert each is not None, "both fractions are above 0"
        for name in each.ids:
            target = folder / each.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                os.link(out / "pictures" / name, target)
    return folder


def run(contestant: Contestant, task: Task) -> dict[str, Any]:
    """What it read, and the seconds it took: by the clock, and of the processor. Raises SystemExit where it fails."""
    shutil.rmtree(task.folder, ignore_errors=True)
    task.folder.mkdir(parents=True)
    cache = task.folder / "cache"  # nobody finds features that another has computed
    environment = os.environ | {"TLTRAIN_CACHE": str(cache), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    began = time.perf_counter()
    with (task.folder / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(list(contestant.command(task)), env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    shutil.rmtree(cache, ignore_errors=True)
    if process.returncode != 0:
        raise SystemExit(f"{contestant.title}, seed {task.seed}, ended with {process.returncode}: see {task.folder / 'log'}")
    return {**contestant.read(task.folder), "seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime}


def small() -> Recipe:
    return _shipped("folder-small")


def probe_of(recipe: Recipe) -> Recipe:
    """The head alone, solved."""
    stage = {"name": "head", "unfreeze": "head", "solve": "ridge", "views": 1, "carry": "last"}
    return validate(recipe.model_dump() | {"name": "ridge", "stages": [stage]}, "the probe")


def plain() -> Recipe:
    """The stages of the folder recipe that has no opinion on size: head, the last groups of blocks, all. 25 passes over the images."""
    changes = {"backbone.name": NAME, "stages.1.name": "blocks.5", "stages.1.unfreeze": "blocks.5"}
    return _shipped("folder-resnet50").override(changes)


def _shipped(name: str) -> Recipe:
    return recipes.parse(recipes.shipped()[name].read_text(encoding="utf-8"), name)


def _train(task: Task, recipe: Recipe) -> list[str]:
    changes = {"data.source": f"folder:{task.images}", "data.seed": task.seed, "seed": task.seed, "backbone.weights": str(task.weights)}
    file = task.folder / "recipe.yaml"
    file.write_text(recipe.override(changes).to_yaml(), encoding="utf-8")
    return [sys.executable, "-m", "tltrain", "train", str(file), "--folder", str(task.folder / "run"), "--workers", "0"]


def _fit(task: Task, minutes: float) -> list[str]:
    words = ["fit", f"folder:{task.images}", "--minutes", f"{minutes:g}", "--backbones", f"{NAME}={task.weights}"]
    return [sys.executable, "-m", "tltrain", *words, "--seed", str(task.seed), "--folder", str(task.folder / "fit"), "--workers", "0"]


def _fastai(task: Task, python: str) -> list[str]:
    script = str(Path(__file__).with_name("fastai_fine_tune.py"))
    words = [str(task.images), str(task.weights), "--images-seen", str(EPOCHS * task.num_train), "--seed", str(task.seed)]
    return [python, script, *words, "--out", str(task.folder / "fastai.json")]


def _timm(task: Task, script: Path) -> list[str]:
    """Its defaults, but for what the task gives: SGD, batches of 128, crops of 8 to 100 %, colour jitter, label smoothing 0.1."""
    epochs = round(EPOCHS * task.num_train / (128 * (task.num_train // 128)))  # it drops the last, smaller batch of each
    given = {
        "data-dir": task.images, "train-split": "train", "val-split": "test", "model": NAME.removeprefix("timm:"),
        "pretrained-path": task.weights, "num-classes": len([*task.images.glob("train/*")]), "epochs": epochs,
        "seed": task.seed, "device": "cpu", "workers": 0, "output": task.folder, "experiment": "timm",
    }  # fmt: skip
    return [sys.executable, str(script), "--pretrained", *(str(word) for key, value in given.items() for word in (f"--{key}", value))]


def _of_run(folder: Path) -> dict[str, Any]:
    return {"top1": read_figures(folder / "run")["top1"]}


def _of_fit(folder: Path) -> dict[str, Any]:
    recipe = yaml.safe_load((folder / "fit" / "recipe.yaml").read_text(encoding="utf-8"))
    size = recipe["data"].get("size")
    chose = ", then ".join(stage.get("solve") or stage["unfreeze"] for stage in recipe["stages"]) + (f" at {size} px" if size else "")
    return {"top1": read_figures(folder / "fit" / "run")["top1"], "chose": chose}


def _of_fastai(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "fastai.json").read_text(encoding="utf-8")))


def _of_timm(folder: Path) -> dict[str, Any]:
    """The last epoch's, not the best on the test images."""
    with (folder / "timm" / "summary.csv").open(encoding="utf-8", newline="") as file:
        return {"top1": float([*csv.DictReader(file)][-1]["eval_top1"]) / 100}


def report(out: Path, taking_part: dict[str, Contestant], num_seeds: int, num_jobs: int = 1) -> str:
    """The table of the seeds that all who have begun have finished, against the first of them, and what it was made with."""
    results = {name: _results(out, name, num_seeds) for name in taking_part}
    begun = {name: by_seed for name, by_seed in results.items() if by_seed}
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in begun.values()))) if begun else []
    if len(seeds) < 2:
        return "fewer than two seeds have the figures of all contestants that have begun"
    told = {taking_part[name].title: [by_seed[seed] for seed in seeds] for name, by_seed in begun.items()}
    about = ({"chose": chosen(begun[FIT], seeds)} if FIT in begun else {}) | _about(out, begun, seeds, num_jobs)
    return "\n".join([show(told), "", *(f"{name:10} {value}" for name, value in about.items())])


def _results(out: Path, name: str, num_seeds: int) -> dict[int, dict[str, Any]]:
    files = {seed: out / f"seed-{seed}" / f"{name}.json" for seed in range(num_seeds)}
    return {seed: json.loads(file.read_text(encoding="utf-8")) for seed, file in files.items() if file.exists()}


def show(told: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table: percent of the test images; what the first has more than each other, paired by seed."""
    (first, base), *_ = told.items()
    lines = [
        f"| who | n | top-1, mean | sd | {first} has more (95 % interval) | seconds | of the processor |",
        "|--|--:|--:|--:|--:|--:|--:|",
    ]
    for title, results in told.items():
        top1 = [100 * each["top1"] for each in results]
        more = "" if results is base else interval(bootstrap([a["top1"] - b["top1"] for a, b in zip(base, results, strict=True)]))
        seconds, used = (statistics.mean(each[key] for each in results) for key in ("seconds", "cpu_seconds"))
        row = [title, len(top1), f"{statistics.mean(top1):.1f}", f"{statistics.stdev(top1):.1f}", more, f"{seconds:.0f}", f"{used:.0f}"]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def chosen(results: dict[int, dict[str, Any]], seeds: Sequence[int]) -> str:
    """What fit chose, and how often."""
    return "; ".join(f"{what}: {times}" for what, times in Counter(results[seed]["chose"] for seed in seeds).most_common())


def _about(out: Path, begun: dict[str, dict[int, dict[str, Any]]], seeds: Sequence[int], num_jobs: int) -> dict[str, str]:
    ours = next((name for name in begun if name not in ("fastai", "timm")), None)
    if ours is None:
        return {}
    folder = out / f"seed-{seeds[0]}" / ours / ("fit/run" if ours == FIT else "run")
    about = describe(folder, small(), len(seeds), num_jobs)
    del about["recipe"]
    others = {result["versions"] for result in begun.get("fastai", {}).values()}
    return about | ({"fastai": "; ".join(sorted(others))} if others else {})


if __name__ == "__main__":
    main()
