"""A stage whose head is solved: what it learns from, what it hands on, and that a stop, a store or a second process changes nothing."""

from __future__ import annotations

import html
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ALL, HEAD, made_recipe, slow
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import world
from benchmarks.world import Trial
from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import class_weights, open_images
from tltrain.data.views import Views
from tltrain.heads.solve import solve
from tltrain.models import factory
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.record import read_run
from tltrain.training.run import train
from tltrain.training.weights import solved
from tltrain.training.weights.solved import groups

RIDGE = {"name": "head", "unfreeze": "head", "solve": "ridge"}
TUNED = ALL | {"steps": 3, "lr": 0.0005, "augment": "none", "views": 1}


def run_of(folder: Path, recipe: Recipe, cache: Any = "never", on_step: Any = lambda stage, step: None) -> Path:
    train(recipe, RunFlags(folder=folder, workers=0, cache=cache), on_step)
    return folder


def weights(run: Path, stage: str = "0-head") -> dict[str, Tensor]:
    return load_file(run / "stages" / stage / "weights.safetensors")


def same(run: Path, other: Path, *stages: str) -> bool:
    return all(torch.equal(tensor, weights(other, stage)[name]) for stage in stages for name, tensor in weights(run, stage).items())


def features_of(recipe: Recipe, views: int) -> tuple[Tensor, Any]:
    """The features of each view of each training image, one by one through the network, and the images."""
    images = open_images(recipe.data)
    student = factory.load(recipe.backbone, classes=images.classes, size=32, resize=32, head="new", seed=0)
    stage = recipe.stages[0]
    made = Views(images.train, student.preprocess, stage.augment, recipe.data.flip, recipe.data.seed, None, False)
    pictures = torch.stack([made.view(i, v) for v in range(views) for i in range(len(images.train))])
    with torch.no_grad():
        return student.chain.eval()(pictures, stop=len(student.chain.blocks) - 1), images


@pytest.mark.parametrize(("kind", "views", "balance"), [("ridge", 1, "none"), ("logistic", 1, "weights"), ("nearest_mean", 3, "sampler")])
def test_the_head_is_that_of_its_features(kind: Any, views: int, balance: str, tmp_path: Path, capsys: Any) -> None:
    stage = RIDGE | {"solve": kind, "carry": "last"} | ({"views": views, "augment": "light"} if views > 1 else {})
    recipe = made_recipe(stages=[stage], data={"balance": balance, "per_class": None, "val_fraction": 0.4, "test_fraction": 0.45})
    run = run_of(tmp_path / "run", recipe)
    features_ND, images = features_of(recipe, views)
    label_N, group_N = np.tile(images.train.labels, views), np.tile(groups(images), views)
    weight_N = None if balance == "none" else class_weights(images.train.labels, 10)[label_N]
    by_hand = solve(kind, features_ND, label_N, 10, weight_N=weight_N, group_N=group_N)
    found = weights(run)
    torch.testing.assert_close(found["fc.weight"].double(), by_hand.weight_KD, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["fc.bias"].double(), by_hand.bias_K, rtol=1e-3, atol=1e-3)
    rows = read_rows(run)
    before, after = (row for row in rows if row["kind"] == "val")
    assert (before["step"], after["step"], after["epoch"]) == (0, 1, views)
    assert after["top1"] > 0.8 > before["top1"]
    (row,) = (row for row in rows if row["kind"] == "solve")
    assert (row["solve"], row["features"], row["step"]) == (kind, views * len(images.train), 1)
    assert "train" not in {row["kind"] for row in rows}
    assert read_run(run).num_images == views * len(images.train)
    assert f"head was worked out, not trained: {row['notes'][0]}" in html.unescape((run / "report.html").read_text())
    assert f"head {row['notes'][0]}" in " ".join(capsys.readouterr().out.split())


def test_stored_computed_and_stopped_runs_end_alike(tmp_path: Path) -> None:
    """A head is solved again after a few steps of the whole network: what a person does who looks at features twice."""
    recipe = made_recipe(
        stages=[RIDGE, TUNED, RIDGE | {"name": "again", "solve": "logistic", "views": 2, "augment": "light", "carry": "last"}], batch=8
    )
    whole = run_of(tmp_path / "whole", recipe)
    stored = run_of(tmp_path / "stored", recipe, "always")
    assert same(whole, stored, "0-head", "1-all", "2-again")
    for place in (("head", 1), ("all", 3)):

        def stop(stage: str, step: int, place: tuple[str, int] = place) -> None:
            if (stage, step) == place:
                os.kill(os.getpid(), signal.SIGTERM)

        folder = tmp_path / "-".join(map(str, place))
        run_of(folder, recipe, on_step=stop)
        assert not (folder / "weights.safetensors").exists() or (folder / "outcome.json").read_text().count("stopped")
        assert same(whole, run_of(folder, recipe), "0-head", "1-all", "2-again"), place
    tuned = [row["top1"] for row in read_rows(whole) if row["kind"] == "val" and row["stage"] == "all"]
    assert tuned[0] > 0.8, "fine-tuning begins where the solved head stands"


def test_a_stop_is_heard_while_the_head_is_worked_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = made_recipe(stages=[RIDGE | {"solve": "logistic"}])
    whole = run_of(tmp_path / "whole", recipe)

    def stopped(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return solve(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(solved, "solve", stopped)
        patch.setattr(solved, "ANSWER_S", 0.0)
        run = run_of(tmp_path / "run", recipe)
    assert [row["kind"] for row in read_rows(run)] == ["val"], "the weights it starts from, and no more"
    assert same(whole, run_of(run, recipe), "0-head")


@pytest.mark.parametrize(("strategy", "num"), [("ddp", 2), slow("ddp", 3), slow("fsdp2", 2), slow("zero2", 2), slow("zero3", 2)])
def test_the_bits_are_those_of_one_process(strategy: str, num: int, tmp_path: Path) -> None:
    stage = RIDGE | {"solve": "logistic" if strategy == "ddp" else "ridge", "carry": "last"}
    spec = made_recipe(stages=[stage], batch=7).model_dump(mode="json")
    start = {"cache": "never"}
    one = world.finish(Trial(spec, str(tmp_path / "one"), start=start))
    many = world.finish(Trial(spec, str(tmp_path / "many"), num, strategy, start=start))
    assert same(one, many, "0-head")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unfreeze": "all"}, "set unfreeze: head"),
        ({"epochs": 3}, "epochs: 3.0 would do nothing; leave it out"),
        ({"steps": 3, "lr": 0.1}, "steps: 3, lr: 0.1 would do nothing; leave them out"),
        ({"mixup": 0.2, "views": 2}, "mixup: 0.2"),
        ({"cutmix": 1.0}, "cutmix: 1.0"),
        ({"label_smoothing": 0.1}, "label_smoothing: 0.1"),
        ({"ema": 0.9}, "ema: 0.9"),
        ({"carry": "blend"}, "set carry: best, or last"),
        ({"augment": "light"}, "set views to null or 2 and more"),
        ({"solve": None}, "exactly one of epochs and steps"),
        ({"solve": None, "steps": 3}, "a stage needs lr"),
        ({"solve": "lda"}, "ridge"),
    ],
)
def test_what_would_do_nothing_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        made_recipe(stages=[RIDGE | changes])
    assert said in str(refused.value)


def test_a_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="learns from labels alone"):
        made_recipe(stages=[RIDGE, ALL], distill={"teacher": {"weights": "shipped:resnet-tiny-printed"}})


@pytest.mark.parametrize(
    ("name", "said"), [("torchvision:squeezenet1_1", "no single linear layer"), ("timm:levit_128s", "cannot run one by one")]
)
def test_a_head_that_is_no_linear_layer_is_refused_before_the_first_step(name: str, said: str, tmp_path: Path) -> None:
    recipe = made_recipe(stages=[RIDGE], backbone={"name": name}, data={"size": None, "resize": None})
    with pytest.raises(UserError, match=said):
        train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_is_solved_and_from_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "solved.yaml"
    file.write_text(made_recipe(stages=[RIDGE | {"views": 4, "augment": "light"}, HEAD | {"name": "steps"}]).to_yaml())
    assert main(["plan", str(file), "--workers", "0"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "solved head: ridge on 240 features of 128 numbers (4 views of 60 images, each read once), then less than a second" in out
    assert "features before head, train, 4 views of 60 images" in out


def test_a_test_run_reads_few_images() -> None:
    recipe = made_recipe(stages=[RIDGE, HEAD | {"name": "steps"}], data={"per_class": None}).smoke()
    assert recipe.data.per_class == 4
    assert recipe.stages[0].steps is None and recipe.stages[1].steps == 2  # noqa: PT018
    assert made_recipe(data={"per_class": None}).smoke().data.per_class is None
