"""`tltrain soup`: averages the weights of finished runs (Wortsman et al. 2022, arXiv 2203.05482), and measures what it gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tltrain.core.errors import UserError, some
from tltrain.core.metric import is_better, metric
from tltrain.core.recipe import Recipe
from tltrain.data import DataSplits, Split, open_images
from tltrain.data.loader import eval_loader
from tltrain.data.sampler import Shard
from tltrain.data.views import Views
from tltrain.distributed.runtime import Runtime, torch_settings_kept
from tltrain.evaluation import metrics
from tltrain.evaluation.evaluator import answers, logits
from tltrain.evaluation.kept_data import for_evaluation
from tltrain.evaluation.promises.fitted import Fitted, fit_on_val
from tltrain.models import factory
from tltrain.models.chain import Chain, on_device
from tltrain.models.metadata import WeightsMetadata, read_card, read_state, write_weights
from tltrain.runs import data_record, run_dir
from tltrain.training.weights.mixing import mix

State = dict[str, Tensor]


@dataclass(frozen=True)
class Ingredient:
    """A finished run, opened from its folder."""

    path: Path
    recipe: Recipe
    card: WeightsMetadata
    state: State


@dataclass(frozen=True)
class Measured:
    """The metrics of one state dict."""

    name: str
    """A run's folder, uniform or greedy."""
    val: dict[str, Any]
    test: dict[str, Any] | None
    """None unless it was asked for."""


@dataclass(frozen=True)
class Soup:
    """The result."""

    folder: Path
    """A run folder with the averaged weights, for evaluate, predict, export, and `backbone.weights`."""
    method: str
    select: str
    """The val metric by which the greedy soup was chosen."""
    kept: tuple[str, ...]
    """The runs in the greedy soup, in the order in which they were added."""
    rows: tuple[Measured, ...]
    """Each run, then uniform, then greedy."""


@torch_settings_kept()
def soup(paths: Sequence[Path], out: Path, method: str, with_test: bool, device_batch: int) -> Soup:
    """Average finished runs of one network and the same classes, and write the average as a run folder.

    out: a new folder. method: which average it holds, uniform or greedy. with_test: measure on test too. device_batch: images at a time.
    The greedy soup begins with the run that is best on val, and adds each other run, the better first, unless that makes val worse.
    Raises UserError for runs that cannot be averaged, or whose val splits differ.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out is {out}, which exists already; name a new folder")
    runs = _opened(paths)
    first = runs[0]
    images, _ = for_evaluation(first.path, open_images(first.recipe.data))
    _check_splits(runs, images, with_test)
    measure, fitted = _measures(first, images, with_test, device_batch)
    select = first.recipe.select
    singles = [measure(str(run.path), run.state) for run in runs]
    uniform_state = mean_of([run.state for run in runs])
    uniform = measure("uniform", uniform_state)
    kept, greedy_state, greedy = _greedy(runs, singles, select, measure)
    state = {"uniform": uniform_state, "greedy": greedy_state}[method]
    done = Soup(out, method, select, tuple(str(runs[i].path) for i in kept), (*singles, uniform, greedy))
    _write(done, first, [str(run.path) for run in runs], state, fitted(state))
    return done


def mean_of(states: Sequence[State]) -> State:
    """The mean of state dicts with equal shares."""
    return mix(states, [1 / len(states)] * len(states)) if len(states) > 1 else dict(states[0])


def _greedy(
    runs: Sequence[Ingredient], singles: Sequence[Measured], select: str, measure: Callable[[str, State], Measured]
) -> tuple[list[int], State, Measured]:
    """(runs that were kept, their mean, its metrics). Of equal runs, the one with the lower val loss is added first."""
    sign = -1 if metric(select).higher_is_better else 1
    order = sorted(range(len(runs)), key=lambda i: (sign * singles[i].val[select], singles[i].val["loss"]))
    kept, state, best = [order[0]], runs[order[0]].state, replace(singles[order[0]], name="greedy")
    for i in order[1:]:
        wider = mean_of([runs[k].state for k in (*kept, i)])
        found = measure("greedy", wider)
        if not is_better(best.val, found.val, select):
            kept, state, best = [*kept, i], wider, found
    return kept, state, best


def _measures(
    first: Ingredient, images: DataSplits, with_test: bool, device_batch: int
) -> tuple[Callable[[str, State], Measured], Callable[[State], Fitted]]:
    """Two functions of a state dict: its metrics, where a label counts as named from 0.5 on, and what is fitted on val."""
    runtime, spec = Runtime(first.recipe.deterministic), first.recipe.data
    backbone = first.recipe.backbone.model_copy(update={"weights": str(first.path)})
    loaded = factory.load(backbone, classes=images.classes, size=spec.size, resize=spec.resize, head="keep", seed=first.recipe.seed)
    chain = on_device(loaded.chain.freeze(len(loaded.chain.blocks), norm_stats=False), runtime.device).eval()

    def batches(split: Split) -> Any:
        views = Views(split, loaded.preprocess, "none", spec.flip, spec.seed)
        return eval_loader(views, Shard(runtime.rank, runtime.world), device_batch, spec.eval_limit, 0, runtime.device.type == "cuda")

    def figures(split: Split | None) -> dict[str, Any]:
        assert split is not None
        return metrics.summary(answers(runtime, chain, batches(split)), len(images.classes))

    def measure(name: str, state: State) -> Measured:
        _load(chain, state)
        return Measured(name, figures(images.val), figures(images.test) if with_test else None)

    def fitted(state: State) -> Fitted:
        _load(chain, state)
        return fit_on_val(
            images, lambda split: logits(runtime, chain, batches(split)), lambda split: answers(runtime, chain, batches(split))
        )

    return measure, fitted


def _load(chain: Chain, state: State) -> None:
    with torch.no_grad():
        chain.net.load_state_dict(state)


def _opened(paths: Sequence[Path]) -> list[Ingredient]:
    """Open the runs. Raises UserError where they cannot be averaged."""
    if len({path.resolve() for path in paths}) < 2:
        raise UserError("a soup is made of two runs or more; give the folders of other seeds, or of other learning rates")
    runs = [_open(path) for path in paths]
    first = runs[0]
    for run in runs[1:]:
        parts = [("networks", first.card.name, run.card.name), ("input sizes", first.card.size, run.card.size)]
        parts += [(f"values of {key}", *(getattr(r.card, key) for r in (first, run))) for key in ("mean", "std", "resize", "interpolation")]
        told = f"{run.path} and {first.path} cannot be averaged"
        for what, ours, theirs in parts:
            if ours != theirs:
                raise UserError(f"{told}: their {what} are {theirs} and {ours}; give runs of one recipe")
        if run.card.classes != first.card.classes:
            differ = sorted(set(run.card.classes or ()) ^ set(first.card.classes or ()))
            raise UserError(
                f"{told}: their classes are others ({some(differ) if differ else 'in another order'}); give runs on one data set"
            )
        if {n: t.shape for n, t in run.state.items()} != {n: t.shape for n, t in first.state.items()}:
            raise UserError(f"{told}: both are a {run.card.name}, and their tensors have other names or shapes; give runs of one recipe")
    return runs


def _open(path: Path) -> Ingredient:
    recipe, outcome = run_dir.read_recipe(path), run_dir.outcome(path).get("outcome", "has not ended yet")
    if outcome != "finished":
        raise UserError(f"{path} is no finished run: it {outcome}; let `tltrain train` finish it, or leave it out")
    file = run_dir.finished_weights(path)
    card = read_card(file)
    if card is None:
        raise UserError(f"{file} does not name its network; give the folder of a run that `tltrain train` wrote")
    return Ingredient(path, recipe, card, read_state(file))


def _check_splits(runs: Sequence[Ingredient], images: DataSplits, with_test: bool) -> None:
    """Check that no run was trained on images that another is measured on. Raises UserError."""
    if images.val is None:
        raise UserError(f"{runs[0].path} has no val split, and a soup is chosen on val; train with data.val_fraction above 0")
    if with_test and images.test is None:
        raise UserError(f"{runs[0].path} has no test split; drop --test")
    for run in runs[1:]:  # the test split is not measured here without --test, but the soup is a run, which has the first one's
        if (parts := [_fold(r.recipe) for r in (runs[0], run)])[0] != parts[1]:
            raise UserError(
                f"{runs[0].path} is {parts[0]} and {run.path} {parts[1]}: one has learned from what the other is tested on, so that no "
                "figure of their mean would mean anything; average seeds of one fold, or train on all images without folds"
            )
    for name in ("val", "test"):
        first = _held_out(runs[0].path, name)
        for run in runs[1:]:
            if (other := _held_out(run.path, name)) != first:
                alone = f"{len(other ^ first):,} images are in one of them alone"
                raise UserError(
                    f"{run.path} has another {name} split than {runs[0].path} ({alone}): one was trained on what the other is measured on; "
                    "give runs of the same data and data.seed, such as seeds"
                )


def _fold(recipe: Recipe) -> str:
    data = recipe.data
    repeat = f" of repeat {data.repeat}" if data.repeat else ""
    return "no fold" if data.folds is None else f"fold {data.fold} of {data.folds}{repeat}"


def _held_out(run: Path, split: str) -> frozenset[tuple[str, ...]]:
    """Identifies the images of a split: names, classes and contents, or a hash of the whole data set for a run that recorded no more."""
    if data_record.read(run) is None:
        return frozenset({(str(run_dir.environment(run).get("data", {}).get("fingerprint")),)})
    samples = data_record.read_samples(run)
    return frozenset((sample.id, sample.label, sample.digest) for sample in samples if sample.split == split)


def _write(done: Soup, first: Ingredient, runs: Sequence[str], state: State, fitted: Fitted) -> None:
    """Write the run folder of a soup: the first run's recipe and data record, and the averaged weights."""
    out, used = done.folder, done.kept if done.method == "greedy" else tuple(runs)
    run_dir.create(out, first.recipe.model_copy(update={"purpose": f"{done.method} soup of {', '.join(used)}"}))
    if (record := first.path / data_record.NAME).is_file():
        shutil.copyfile(record, out / data_record.NAME)
    environment = run_dir.environment(first.path)
    run_dir.write_environment(out, environment["accelerate"], environment["hardware"]["device"], {}, environment["data"])
    write_weights(run_dir.weights_file(out), state, fitted.on(first.card))
    figures = {row.name: {"val": row.val} | ({"test": row.test} if row.test else {}) for row in done.rows}
    run_dir.seal(out)
    run_dir.write_outcome(out, 0, {"outcome": "finished", "soup": {"method": done.method, "runs": list(used), "figures": figures}})
