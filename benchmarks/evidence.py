"""What a recipe's stages, views or teacher give: its variants over several seeds, paired by seed, for any recipe."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import jobs
from benchmarks.demo_gain import bootstrap, cpu_name, interval
from tltrain.commands import demo
from tltrain.core import files
from tltrain.core.arguments import parsing
from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe, Stage, validate

VIEWS = (1, 4, 16, None)
PER_CLASS = (None, 20, 10, 5, 2)
TOP_K = (10, 3, 1)


@dataclass(frozen=True)
class Row:
    """One variant over all seeds; accuracies are shares, paired differences are to the first variant."""

    title: str
    top1: list[float]
    seconds: list[float]
    difference: tuple[float, float, float] | None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("question", choices=list(QUESTIONS), help="stages: against one fine-tune as long, and the head alone; "
                        "views: of the first stage, 1, 4, 16 and fresh; distill: against the same student without its teacher; "
                        "answers: the teacher's, whole, in fp32, and the 10, 3 and 1 likeliest classes; "
                        "methods: biases and norms, LoRA, EMA and blend in the last stage, and all blocks at once; "
                        "images: the head solved on all training images, and on 20, 10, 5 and 2 of each class")  # fmt: skip
    parser.add_argument("recipe", help="a shipped name or a .yaml file")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1, of recipe and data (default: 5)")
    parser.add_argument("--only", nargs="+", metavar="TITLE", help="the variants to train, by their titles; the first one is compared with")
    jobs.add_to(parser, "runs, each in a process of one thread,")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder of the runs (default: runs/evidence)")
    arguments, overrides = parser.parse_known_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds is {arguments.seeds}; a spread needs at least 2")
    try:
        recipe, _ = parsing.parse("train", [arguments.recipe, *overrides])
        variants = _chosen(QUESTIONS[arguments.question](recipe), arguments.only)
    except UserError as error:
        parser.error(str(error))
    out = arguments.out / f"{recipe.name}-{arguments.question}"
    console = Console(highlight=False, soft_wrap=True)
    for num_seeds in train_all(variants, out, arguments.seeds, arguments.jobs):
        console.print(f"seed {num_seeds - 1}: {len(variants)} runs stand", markup=False)
        if num_seeds > 1:
            said = write(variants, out, recipe, num_seeds, arguments.jobs)  # after each seed: what is cut off has lost little
    print(said)


def write(variants: dict[str, Recipe], out: Path, recipe: Recipe, num_seeds: int, num_jobs: int) -> str:
    """Write the figures of the first `num_seeds` seeds to `out`/evidence.json. Returns the table, and what it was made with."""
    rows = summarise(variants, out, num_seeds)
    about = describe(out / "seed-0" / next(iter(variants.values())).name, recipe, num_seeds, num_jobs)
    file = out / "evidence.json"
    files.write_atomic(file, json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return "\n".join([show(rows), "", *(f"{name:10} {value}" for name, value in about.items()), f"{'figures':10} {file}"])


def _chosen(variants: dict[str, Recipe], only: list[str] | None) -> dict[str, Recipe]:
    """The variants with these titles, in their order. All for None. Raises UserError for an unknown title."""
    unknown = [title for title in only or () if title not in variants]
    if unknown:
        raise UserError(f"--only is {unknown[0]!r}, and no variant is called that; there are: {'; '.join(variants)}")
    return {title: variants[title] for title in only} if only else variants


def by_stages(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe, one fine-tune of everything as long as all its stages, and its first stage as long."""
    if len(recipe.stages) < 2:
        raise UserError(f"recipe {recipe.name} has one stage; there is nothing to compare its stages with")
    whole, head = (_as_long(recipe, stage) for stage in (recipe.stages[-1], recipe.stages[0]))
    names = f"{recipe.stages[-1].name} alone, as long", f"{recipe.stages[0].name} alone, as long"
    return {"in stages": _named(recipe, "stages"), names[0]: _named(recipe, "whole", (whole,)), names[1]: _named(recipe, "head", (head,))}


def by_views(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe with 1, 4, 16 and fresh views in its first stage; more than one are augmented as its last stage is, light at least."""
    first, *rest = recipe.stages
    augment = recipe.stages[-1].augment if recipe.stages[-1].augment != "none" else "light"
    variants = {}
    for views in VIEWS:
        stage = first.model_copy(update={"views": views, "augment": "none" if views == 1 else augment})
        title = "fresh views" if views is None else f"{views} view{'s' if views > 1 else ''}"
        variants[title] = _named(recipe, f"views-{views or 'fresh'}", (stage, *rest))
    return variants


def by_teacher(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe, and the same without its teacher."""
    if recipe.distill is None:
        raise UserError(f"recipe {recipe.name} has no teacher; give one that distils, such as digits-distill")
    return {"with its teacher": _named(recipe, "taught"), "alone": _named(recipe.model_copy(update={"distill": None}), "alone")}


def by_answers(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe with its teacher's answers whole, in other precision, and in short; and without its teacher."""
    variants = by_teacher(recipe)
    taught, alone = variants.values()

    def stored(name: str, **changes: Any) -> Recipe:
        assert taught.distill is not None
        return _named(taught.model_copy(update={"distill": taught.distill.model_copy(update=changes)}), name)

    short = {f"top {k}": stored(f"top-{k}", top_k=k, logits="float16") for k in TOP_K}
    whole = {"all classes": stored("all", top_k=None, logits="float16"), "all, float32": stored("float32", top_k=None, logits="float32")}
    return {**whole, **short, "alone": alone}


def by_methods(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe, and what else its last stage could train or hand on; all blocks at once, as long; its first stage, as long."""
    if len(recipe.stages) < 2:
        raise UserError(f"recipe {recipe.name} has one stage; methods are compared in the last of two or more")
    *before, last = recipe.stages
    whole = _as_long(recipe, last.model_copy(update={"name": "all", "unfreeze": "all", "views": None, "layer_decay": 0.8}))
    in_last_stage: dict[str, dict[str, Any]] = {
        "biases and norms": {"trains": "biases_and_norms", "lr": 3 * (last.lr or 0.0)},  # few parameters take larger steps
        "LoRA": {"trains": "lora", "lr": 3 * (last.lr or 0.0)},
        "EMA": {"ema": 0.999, "carry": "ema"},
        "blend": {"carry": "blend"},
    }
    variants = {"in stages": _named(recipe, "stages")}
    for title, changes in in_last_stage.items():
        variants[title] = _named(recipe, title.replace(" ", "-"), (*before, last.model_copy(update=changes)))
    variants["head alone, as long"] = _named(recipe, "head", (_as_long(recipe, recipe.stages[0]),))
    variants["all at once, layer decay"] = _named(recipe, "all", (whole,))
    random = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"name": recipe.backbone.name, "weights": None})})
    variants["the same, random weights"] = _named(random, "random", (whole,))
    return variants


def by_images(recipe: Recipe) -> dict[str, Recipe]:
    """The head alone, solved on all training images and on fewer of each class."""
    head = Stage.model_validate({"name": "head", "unfreeze": "head", "solve": "ridge", "views": 1, "carry": "last"})
    variants = {}
    for most in PER_CLASS:
        fewer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"per_class": most})})
        title = "all images" if most is None else f"{most} of each class"
        variants[title] = _named(fewer, f"images-{most or 'all'}", (head,))
    return variants


QUESTIONS: dict[str, Callable[[Recipe], dict[str, Recipe]]] = {
    "stages": by_stages, "views": by_views, "distill": by_teacher, "answers": by_answers, "methods": by_methods, "images": by_images,
}  # fmt: skip


def _as_long(recipe: Recipe, stage: Stage) -> Stage:
    """A stage that takes as many steps as the whole recipe."""
    lengths: dict[str, list[float | None]] = {"epochs": [s.epochs for s in recipe.stages], "steps": [s.steps for s in recipe.stages]}
    for unit, values in lengths.items():
        given = [value for value in values if value is not None]
        if len(given) == len(recipe.stages):
            return stage.model_copy(update={"epochs": None, "steps": None, unit: sum(given)})
    raise UserError(f"recipe {recipe.name} mixes epochs and steps, so that its length is not one number; give all stages the same")


def _named(recipe: Recipe, name: str, stages: tuple[Stage, ...] | None = None) -> Recipe:
    """A checked variant of a recipe."""
    return validate(recipe.model_copy(update={"name": name, "stages": stages or recipe.stages}).model_dump(), f"variant {name}")


def train_all(variants: dict[str, Recipe], out: Path, num_seeds: int, num_jobs: int = 1) -> Iterator[int]:
    """Train what is not finished yet, `num_jobs` runs at a time. Yields how many seeds stand, after each of them, in their order.

    One run at a time is trained here, several in processes of their own, with the same results. Raises SystemExit where one fails.
    """
    teaches = any(variant.distill is not None for variant in variants.values())
    tasks = [(seed, title, *_of_seed(variant, out, seed, teaches)) for seed in range(num_seeds) for title, variant in variants.items()]
    with _trainers(num_jobs) as start:
        ends = [start(recipe, path) for _, _, recipe, path in tasks]
        for i, ((seed, title, *_), end) in enumerate(zip(tasks, ends, strict=True), start=1):
            outcome, said = end()
            if outcome != "finished":
                raise SystemExit(f"seed {seed}, {title}: {outcome}: {said}")
            if i % len(variants) == 0:
                yield seed + 1


def _of_seed(variant: Recipe, out: Path, seed: int, teaches: bool) -> tuple[Recipe, Path]:
    """A variant with this seed, and the folder of its run."""
    # A teacher has seen the labels of its own split: with other data seeds it would know the student's test images.
    data = variant.data if teaches else variant.data.model_copy(update={"seed": seed})
    return variant.model_copy(update={"seed": seed, "data": data}), out / f"seed-{seed}" / variant.name


End = Callable[[], tuple[str, str]]
"""Waits for a run. Returns what `demo.run_quietly` does."""


@contextlib.contextmanager
def _trainers(num_jobs: int) -> Iterator[Callable[[Recipe, Path], End]]:
    """What begins a run, or keeps it until it is waited for. On an error, runs that have not begun are left out."""
    if num_jobs == 1:
        yield lambda recipe, path: partial(_train, recipe, path)
        return
    # Spawned: a forked process cannot use a GPU that its parent has begun to use.
    with ProcessPoolExecutor(num_jobs, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        try:
            yield lambda recipe, path: pool.submit(_train, recipe, path).result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this process when the one that started it ends, however that is killed: else it would go on with the runs that are left."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a trainer is started by the benchmark"

    def wait() -> None:
        parent.join()
        os._exit(1)  # a run goes on from its checkpoint

    threading.Thread(target=wait, daemon=True).start()


def _train(recipe: Recipe, path: Path) -> tuple[str, str]:
    with demo.one_thread():
        return demo.run_quietly(recipe, path)


def summarise(variants: dict[str, Recipe], out: Path, num_seeds: int) -> list[Row]:
    """The figures of the first `num_seeds` seeds. Raises UserError where a run has none."""
    found = {title: [demo.read_figures(out / f"seed-{seed}" / v.name) for seed in range(num_seeds)] for title, v in variants.items()}
    top1 = {title: [figures["top1"] for figures in each] for title, each in found.items()}
    seconds = {title: [figures["seconds"] for figures in each] for title, each in found.items()}
    base = next(iter(top1.values()))
    differences = {t: None if v is base else bootstrap([a - b for a, b in zip(v, base, strict=True)]) for t, v in top1.items()}
    return [Row(title, top1[title], seconds[title], differences[title]) for title in variants]


def describe(run: Path, recipe: Recipe, num_seeds: int, num_jobs: int = 1) -> dict[str, str]:
    """What the figures were made with. num_jobs: runs at a time."""
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    versions = environment["versions"]
    test = json.loads((run / "test_metrics.json").read_text(encoding="utf-8"))
    drawn = "recipe and data: each has its own" if recipe.distill is None else "the recipe, on the data its teacher had:"
    names = ("tltrain", "python", "torch", "torchvision", "transformers", "numpy")
    return {
        "recipe": recipe.name,
        "seeds": f"{num_seeds}, of {drawn} {test['n']} test images, the same for all variants",
        "hardware": _hardware(environment, num_jobs),
        "versions": ", ".join(f"{name} {versions[name]}" for name in names),
    }


def _hardware(environment: dict[str, Any], num_jobs: int) -> str:
    """The machine of a run, by its env.json and by this machine's processor."""
    device, precision = environment["hardware"]["device"], environment["accelerate"]["precision"]
    gpu = "" if device == "cpu" else f"{device} ({'fp32, products in TF32' if precision == 'no' else precision}), "
    at_once = f", {num_jobs} runs at a time" if num_jobs > 1 else ""
    return f"{gpu}{cpu_name()}, one thread of {os.cpu_count()} cores{at_once}"


def show(rows: list[Row]) -> str:
    """A Markdown table: percent of the test images, differences paired by seed."""
    lines = [f"| variant | n | top-1, mean | sd | against {rows[0].title} (95 % interval) | seconds |", "|--|--:|--:|--:|--:|--:|"]
    for row in rows:
        mean, sd = 100 * statistics.mean(row.top1), 100 * statistics.stdev(row.top1)
        difference = interval(row.difference) if row.difference else ""
        lines.append(f"| {row.title} | {len(row.top1)} | {mean:.1f} | {sd:.1f} | {difference} | {statistics.mean(row.seconds):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
