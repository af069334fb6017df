"""What a teacher gives a small network, and what patience gives: `tltrain distil` against its parts, over splits, paired.

    python -m benchmarks.distil_gain pictures folder-small --to timm:mobilenetv3_small_050

The teacher is trained by the recipe (behind which stand changes of it, such as --backbone.weights FILE). The student's recipe is that of
`tltrain distil`; the contestants change its length, its views or its teachers. Each is a process of one thread with a cache of its own, so
that its seconds count the teacher's answers too. One that is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import fit_gain, jobs
from benchmarks.evidence import describe
from benchmarks.fit_gain import Contestant, Task
from tltrain.commands.demo import read_figures
from tltrain.core import recipe as recipes
from tltrain.core.arguments import parsing
from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe
from tltrain.runs import run_dir

FIRST = "distil"
MIXUP = 0.5


@dataclass(frozen=True)
class Asked:
    """What is compared."""

    teacher: Recipe
    to: str
    epochs: tuple[int, int]
    """Of a short and of a long run."""
    views: int
    folds: int
    seeds: int
    """Teachers of other seeds beside the first."""


@dataclass(frozen=True)
class Arm:
    """A student."""

    title: str
    teachers: str
    """`one`, `seeds`, `folds`."""
    changes: Callable[[Recipe, Asked], Recipe]
    """Of the recipe that `tltrain distil` writes for these teachers."""


def lasting(recipe: Recipe, epochs: float, num_train: int, views: int, **more: Any) -> Recipe:
    """A student's recipe of another length and of other views. View 1 is the evaluation view, which nothing changes."""
    steps = max(1, math.ceil(epochs * num_train / recipe.batch))
    changes = {"steps": steps, "views": views, "eval_epochs": max(1.0, epochs / 4), **({"augment": "none"} if views == 1 else {}), **more}
    return recipe.override({f"stages.0.{key}": value for key, value in changes.items()})


def arms(num_train: int) -> dict[str, Arm]:
    """Name, which is that of its folder, to student."""

    def taught(long: bool, num: int | None = None, **more: Any) -> Callable[[Recipe, Asked], Recipe]:
        return lambda recipe, asked: lasting(recipe, asked.epochs[long], num_train, asked.views if num is None else num, **more)

    def alone(long: bool) -> Callable[[Recipe, Asked], Recipe]:
        return lambda recipe, asked: taught(long)(recipe, asked).model_copy(update={"distill": None})

    return {
        FIRST: Arm("distil", "one", taught(True)),
        "short": Arm("distil, short", "one", taught(False)),
        "one-view": Arm("distil, 1 view, long", "one", taught(True, 1)),
        "mixed": Arm("distil, long, with mixup", "one", taught(True, mixup=MIXUP)),
        "seeds": Arm("distil, long, from several seeds", "seeds", taught(True)),
        "folds": Arm("distil, long, from folds", "folds", taught(True)),
        "alone": Arm("the student alone, long", "one", alone(True)),
        "alone-short": Arm("the student alone, short", "one", alone(False)),
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distil_gain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path, help="a folder with one subfolder a class, such as benchmarks.pictures makes")
    parser.add_argument("recipe", help="the teacher's: a shipped name or a .yaml file")
    parser.add_argument("--to", required=True, metavar="BACKBONE", help="the student, as tltrain distil takes it")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1, of the split and of all that is drawn (default: 5)")
    parser.add_argument("--epochs", type=int, nargs=2, default=(50, 300), help="of a short and of a long run (default: 50 300)")
    parser.add_argument("--views", type=int, default=64, help="stored views of each image (default: 64)")
    parser.add_argument("--folds", type=int, default=5, help="teachers that are folds (default: 5)")
    parser.add_argument("--more-seeds", type=int, default=4, help="teachers of other seeds beside the first (default: 4)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"run these alone: {', '.join(arms(1))}")
    jobs.add_to(parser, "teachers, then students")
    parser.add_argument("--out", type=Path, default=Path("runs/distil-gain"), help="folder of everything (default: runs/distil-gain)")
    given, overrides = parser.parse_known_args(words)
    if unknown := [name for name in given.only or () if name not in arms(1)]:
        parser.error(f"--only is {unknown[0]}, which takes no part; there are: {', '.join(arms(1))}")
    if given.seeds < 2:
        parser.error(f"--seeds is {given.seeds}; a spread needs at least 2")
    try:
        recipe, _ = parsing.parse("train", [given.recipe, *overrides])
    except UserError as error:
        parser.error(str(error))
    asked, out = Asked(recipe, given.to, tuple(given.epochs), given.views, given.folds, given.more_seeds), given.out.absolute()
    fit_gain.write_pictures(given.pictures, out)
    run_all(asked, out, range(given.seeds), given.only or list(arms(1)), given.jobs)
    print(report(out, given.seeds, given.jobs))


def run_all(asked: Asked, out: Path, seeds: Iterable[int], names: Sequence[str], num_jobs: int = 1) -> None:
    """Run what is not finished, `num_jobs` at a time: the teachers that these students need, then the recipes, then the students."""
    all_arms = arms(len([*fit_gain.split(out, 0).glob("train/*/*")]))
    left = [(seed, name) for seed in seeds for name in all_arms if name in names and not _result(out, seed, name).exists()]
    for seed in {seed for seed, _ in left}:
        fit_gain.split(out, seed)
    taught = dict.fromkeys((seed, teacher) for seed, name in left for teacher in _teachers(asked, all_arms[name].teachers))
    jobs.at_once([partial(_taught, asked, out, *each) for each in taught], num_jobs)
    drafts = dict.fromkeys((seed, all_arms[name].teachers) for seed, name in left)
    jobs.at_once([partial(_draft, asked, out, *each) for each in drafts], num_jobs)
    jobs.at_once([partial(_student, asked, out, seed, name, all_arms[name]) for seed, name in left], num_jobs)


def _student(asked: Asked, out: Path, seed: int, name: str, arm: Arm) -> None:
    recipe = arm.changes(recipes.load(str(_draft_file(out, seed, arm.teachers))).override({"name": name}), asked)
    task = Task(out / f"seed-{seed}" / "images", Path(), out / f"seed-{seed}" / name, seed)
    fit_gain.finished(Contestant(arm.title, partial(_train, recipe=recipe), _of_run), task)


def _teachers(asked: Asked, which: str) -> list[str]:
    return {"one": ["teacher"], "seeds": ["teacher", *(f"teacher-{k + 1}" for k in range(asked.seeds))], "folds": ["teacher-folds"]}[which]


def _taught(asked: Asked, out: Path, seed: int, name: str) -> None:
    """Train a teacher, or its folds, unless that is done."""
    task = Task(out / f"seed-{seed}" / "images", Path(), out / f"seed-{seed}" / name, seed)
    another = 0 if name in ("teacher", "teacher-folds") else 1_000 * int(name.rpartition("-")[2])
    recipe = asked.teacher.override({"data.source": f"folder:{task.images}", "data.seed": seed, "seed": seed + another})
    in_folds = ["--k", str(asked.folds)] if name == "teacher-folds" else []
    how = Contestant(name, partial(_train, recipe=recipe, in_folds=in_folds), lambda _: {} if in_folds else _of_run(task.folder))
    fit_gain.finished(how, task)


def _draft_file(out: Path, seed: int, teachers: str) -> Path:
    return out / f"seed-{seed}" / f"recipe-from-{teachers}" / "recipe.yaml"


def _draft(asked: Asked, out: Path, seed: int, teachers: str) -> None:
    """Have `tltrain distil` write the recipe of a student of these teachers, for all arms. Raises SystemExit where it refuses."""
    file = _draft_file(out, seed, teachers)
    if file.exists():
        return
    runs = [str(out / f"seed-{seed}" / teacher / "run") for teacher in _teachers(asked, teachers)]
    words = ["distil", *runs, "--to", asked.to, "--dry-run", "--folder", str(file.parent), "--workers", "0"]
    done = subprocess.run([sys.executable, "-m", "tltrain", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"seed {seed}, from {teachers}: {done.stderr}")


def _train(task: Task, recipe: Recipe, in_folds: Sequence[str] = ()) -> list[str]:
    file = task.folder / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    verb = ["folds", str(file), *in_folds] if in_folds else ["train", str(file)]
    return [sys.executable, "-m", "tltrain", *verb, "--folder", str(task.folder / "run"), "--workers", "0"]


def _of_run(folder: Path) -> dict[str, Any]:
    return {"top1": read_figures(folder / "run")["top1"]}


def _result(out: Path, seed: int, name: str) -> Path:
    return out / f"seed-{seed}" / f"{name}.json"


def report(out: Path, num_seeds: int, num_jobs: int = 1) -> str:
    """The table of the seeds that all students have finished that have begun, what their teachers took, and what it was made with."""
    titles = {"teacher": "the teacher", **{name: arm.title for name, arm in arms(1).items()}}
    found = {name: _results(out, name, num_seeds) for name in (FIRST, *(name for name in titles if name != FIRST))}
    begun = {name: by_seed for name, by_seed in found.items() if by_seed}
    seeds = sorted(set.intersection(*map(set, begun.values()))) if begun else []
    if len(seeds) < 2 or FIRST not in begun:
        return f"fewer than two seeds have the figures of all that have begun, {FIRST} among them"
    told = {titles[name]: [by_seed[seed] for seed in seeds] for name, by_seed in begun.items()}
    run = out / f"seed-{seeds[0]}" / FIRST / "run"
    about = describe(run, run_dir.read_recipe(run).model_copy(update={"distill": None}), len(seeds), num_jobs)  # each seed has its own data
    more = [name for name in ("teacher-folds", "teacher-1") if len(_results(out, name, num_seeds)) > 0]
    taken = {name: [each["seconds"] for each in _results(out, name, num_seeds).values()] for name in more}
    about |= {f"{name} takes": f"{sum(seconds) / len(seconds):.0f} s" for name, seconds in taken.items()}
    return "\n".join([fit_gain.show(told), "", *(f"{name:10} {value}" for name, value in about.items())])


def _results(out: Path, name: str, num_seeds: int) -> dict[int, dict[str, Any]]:
    files = {seed: _result(out, seed, name) for seed in range(num_seeds)}
    return {seed: json.loads(file.read_text(encoding="utf-8")) for seed, file in files.items() if file.exists()}


if __name__ == "__main__":
    main()
