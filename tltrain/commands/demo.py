"""`tltrain demo`: transfers networks from printed characters to handwritten digits with five labels a class, in minutes on a CPU."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.status import Status
from rich.table import Table

from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Terminal, duration
from tltrain.core.recipe import Augment, Backbone, Data, Distill, Recipe, Stage
from tltrain.data import open_images
from tltrain.runs import run_dir
from tltrain.runs.pages.write import write_comparison
from tltrain.runs.report.stats import wilson
from tltrain.training import optim
from tltrain.training.experiment import Experiment
from tltrain.training.loop import OnStep, ignore_step
from tltrain.training.run import train

PER_CLASS, NUM_CLASSES = 5, 10
NUM_LABELS = PER_CLASS * NUM_CLASSES
RESNET, VIT, STUDENT = "resnet-tiny", "vit-tiny", "resnet-micro"
TITLE = "From printed characters to handwritten digits"
LEAD = (
    f"Every run learns from the same {NUM_LABELS} labelled images, {PER_CLASS} of each digit. There are no val images, which would be "
    "labelled images too: every stage hands on its last weights. The settings were found beforehand, on other draws of the same data. "
    "The distilled network also learns what the ResNet in stages says of these images. The pretrained weights come from rendered "
    "characters, 0 to 9 and A to Z: the ten digits are among them, printed and bent; handwriting is not. Training from scratch takes more "
    "steps. A ViT from scratch, which takes ten times as many and would still gain from more, is left out: `python -m "
    "benchmarks.demo_gain` of a checkout trains it too."
)
LONG = ("vit-scratch",)
"""Runs that take most of the time of all, and that the demo leaves to benchmarks/demo_gain.py."""


@dataclass(frozen=True)
class Arm:
    """One run of the demo. Its folder has the name of its recipe."""

    title: str
    recipe: Recipe

    def path(self, out: Path) -> Path:
        return out / self.recipe.name


def demo_data(seed: int) -> Data:
    """scikit-learn's digits: half for test, and five of each class from the other half for training. The seed selects both."""
    return Data(source="digits", seed=seed, val_fraction=0, test_fraction=0.5, per_class=PER_CLASS, flip=False)


def arms(data: Data, seed: int, out: Path) -> tuple[Arm, ...]:
    """The runs in order. The last one is distilled from the run `resnet-stages` in `out`, so that one must come before it."""
    resnet, vit = (Backbone(name=name, weights=f"shipped:{name}-printed") for name in (RESNET, VIT))
    teacher = Distill(teacher=Backbone(weights=str(out / "resnet-stages")), weight=0.7)
    table: list[tuple[str, str, Backbone, Distill | None, tuple[Stage, ...]]] = [
        ("resnet-scratch", "ResNet, from scratch", Backbone(name=RESNET), None, (_scratch(150, 1e-3),)),
        ("resnet-head", "ResNet, head only", resnet, None, (stage("head", "head", 100, 1e-2),)),
        ("resnet-stages", "ResNet, in stages", resnet, None, _stages((30, 30, 40), "layer3", 5e-4, 2e-4, "none")),
        ("vit-scratch", "ViT, from scratch", Backbone(name=VIT), None, (_scratch(1000, 1e-3),)),
        ("vit-head", "ViT, head only", vit, None, (stage("head", "head", 100, 1e-2, augment="light"),)),
        ("vit-stages", "ViT, in stages", vit, None, _stages((20, 20, 60), "block.2", 1e-3, 1e-3, "light")),
        ("student-alone", "Small ResNet, alone", Backbone(name=STUDENT), None, (_scratch(150, 1e-2),)),
        ("student-distilled", "Small ResNet, distilled", Backbone(name=STUDENT), teacher, (_scratch(150, 1e-2),)),
    ]  # fmt: skip
    return tuple(
        Arm(title, Recipe(name=name, purpose=title, seed=seed, batch=NUM_LABELS, data=data, backbone=net, distill=distill, stages=stages_))
        for name, title, net, distill, stages_ in table
    )


def run_demo(out: Path, seed: int) -> str:
    """Train every run into `out`, print a table and write a report page. Earlier progress is resumed.

    Returns finished, stopped or failed. Raises UserError.
    """
    console = Terminal(file=sys.stdout, highlight=False, soft_wrap=True)  # the terminal, also while the output of a run is captured
    planned = [arm for arm in arms(demo_data(seed), seed, out) if arm.recipe.name not in LONG]
    _introduce(console, planned, out)
    with one_thread():
        for i, arm in enumerate(planned, start=1):
            line = f"{i}/{len(planned)}  {arm.title:24}"
            with console.status(line) as status:
                outcome, last_line = run_quietly(arm.recipe, arm.path(out), _progress_hook(status, line, arm.recipe))
            if outcome != "finished":
                console.print(f"{line} {outcome}: {last_line}", markup=False)
                return outcome
            figures = read_figures(arm.path(out))
            console.print(f"{line} top-1 {100 * figures['top1']:5.1f} %  {duration(figures['seconds']):>6}", markup=False)
    console.print()
    console.print(results(planned, out))
    page = write_comparison([arm.path(out) for arm in planned], out / "index.html", TITLE, LEAD, [arm.title for arm in planned])
    console.print(
        "\nparameters: those that train. The interval counts the luck of the test images, not "
        "that of the labelled ones: `python -m benchmarks.demo_gain` repeats this over seeds.\n\n"
        f"page    {page}",
        markup=False,
    )
    return "finished"


def _progress_hook(status: Status, line: str, recipe: Recipe) -> OnStep:
    """Shows on the status line how far a run has come."""
    before, total = {}, 0
    for each in recipe.stages:
        before[each.name] = total
        total += each.steps or 0

    def on_step(stage: str, step: int) -> None:
        status.update(f"{line} stage {stage}, step {before[stage] + step} of {total}")

    return on_step


def run_quietly(recipe: Recipe, path: Path, on_step: OnStep = ignore_step) -> tuple[str, str]:
    """Train with the console output captured. Returns (outcome, last line of the output). Raises UserError."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        outcome = train(recipe, RunFlags(folder=path, workers=0), on_step)["outcome"]
    return str(outcome), (output.getvalue().strip().splitlines() or [""])[-1].strip()


def read_figures(path: Path) -> dict[str, float]:
    """Test metrics of a finished run: n (images), top1 (0 to 1) and seconds of training. Raises UserError."""
    test = run_dir.test_metrics(path)
    if test is None:
        raise UserError(f"{path} says it is finished and has no test figures; delete that folder, and start again")
    return {key: test[key] for key in ("n", "top1", "seconds")}


def num_trained(recipe: Recipe) -> int:
    """Number of trainable parameters in the stage that has most."""
    experiment = Experiment.outline(recipe, open_images(recipe.data))
    return max(optim.trainable(experiment.student.chain, stage) for stage in experiment.plan)


def results(planned: Sequence[Arm], out: Path) -> Table:
    """The table of results, the best first, at most 80 columns wide. Its parameters are the trainable ones."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run", no_wrap=True)
    for head in ("parameters", "labels", "top-1 (95 % interval)", "seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    found = [(arm, read_figures(arm.path(out))) for arm in planned]
    for arm, figures in sorted(found, key=lambda pair: -pair[1]["top1"]):
        low, high = wilson(figures["top1"], int(figures["n"]))
        top1 = f"{100 * figures['top1']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        table.add_row(arm.title, f"{num_trained(arm.recipe):,}", str(NUM_LABELS), top1, f"{figures['seconds']:.1f}")
    return table


def _introduce(console: Terminal, planned: Sequence[Arm], out: Path) -> None:
    images = open_images(planned[0].recipe.data)
    assert images.test is not None, "the demo's data have a test split"
    console.print(TITLE, style="bold")
    console.print(
        "source  a ResNet and a ViT that know 40,000 rendered characters, 0-9 and A-Z\n"
        f"target  scikit-learn's digits: {len(images.train)} labelled images, {PER_CLASS} of each; {len(images.test)} to test\n"
        f"runs    {len(planned)}, into {out}; after a stop the same command goes on\n",
        markup=False,
    )


def stage(
    name: str, unfreeze: str, steps: int, lr: float, layer_decay: float = 1.0, augment: Augment = "none",
    norm_stats: Literal["frozen", "train"] = "frozen",
) -> Stage:  # fmt: skip
    return Stage(
        name=name, unfreeze=unfreeze, steps=steps, lr=lr, layer_decay=layer_decay, weight_decay=0.01, warmup=0.1, augment=augment,
        norm_stats=norm_stats, carry="last",
    )  # fmt: skip


def _scratch(steps: int, lr: float) -> Stage:
    """A stage that trains all blocks from random weights, with augmentation and BatchNorm statistics of the new data."""
    return stage("all", "all", steps, lr, augment="light", norm_stats="train")


def _stages(steps: tuple[int, int, int], top: str, lr_top: float, lr_all: float, augment: Augment) -> tuple[Stage, ...]:
    """Three stages: the head, the blocks from `top` on, all blocks. BatchNorm keeps its pretrained statistics."""
    return (
        stage("head", "head", steps[0], 1e-2, augment=augment),
        stage("top", top, steps[1], lr_top, 0.7, augment),
        stage("all", "all", steps[2], lr_all, 0.7, augment),
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run on one CPU thread. Networks this small are faster so, and sums have the same order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
