"""The demo: its source task, the weights that come with it, its recipes, and one arm of it in miniature."""

from __future__ import annotations

import json
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tltrain.cli.main import main
from tltrain.commands import demo
from tltrain.core import recipe, stage_plan
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Backbone, Data, Recipe
from tltrain.data import open_images
from tltrain.data.loader import eval_loader
from tltrain.data.sampler import Shard
from tltrain.data.sources import printed as source
from tltrain.data.views import Preprocess, Views
from tltrain.models import factory
from tltrain.models.weights import find
from tltrain.training.loop import OnStep
from tltrain.training.run import train

SHIPPED = ("resnet-tiny-printed", "vit-tiny-printed")


def test_a_printed_image_is_a_function_of_seed_and_number() -> None:
    numbers = np.random.default_rng(0).integers(0, 10**6, 80)
    batch = source.render_batch(numbers, 3)
    assert batch.shape == (80, 8, 8)
    assert batch.dtype == np.uint8
    assert all(np.array_equal(source.render(int(n), 3), image) for n, image in zip(numbers, batch, strict=True))
    assert np.array_equal(source.render_batch(numbers[::-1][:33], 3), batch[::-1][:33])
    assert (source.render_batch(numbers, 4) != batch).mean() > 0.3
    assert len({image.tobytes() for image in batch}) == len(batch)
    assert batch.min() == 0
    assert batch.max() == 16


def test_the_source_is_split_as_any_other() -> None:
    images = open_images(Data(source="printed", val_fraction=0.05, test_fraction=0.05))
    assert images.classes == tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") == source.classes()
    assert images.val is not None
    assert images.test is not None
    parts = [images.train, images.val, images.test]
    assert sorted(np.concatenate([p.source_index for p in parts]).tolist()) == list(range(source.NUM_IMAGES))
    for part in parts:
        assert np.array_equal(part.labels, source.labels(part.source_index, source.SEED))
        assert np.bincount(part.labels, minlength=36).min() > 0
    assert open_images(Data(source="printed", val_fraction=0.05, test_fraction=0.05)).fingerprint == images.fingerprint


def test_a_printed_and_a_handwritten_image_go_the_same_way() -> None:
    """Both are grey sixteenths scaled to 255, decoded to RGB, resized and cropped by the same views."""
    from sklearn.datasets import load_digits

    sixteenths = {"digits": load_digits().images, "printed": source.render_batch(np.arange(600), source.SEED)}
    for name, images_NHW in sixteenths.items():
        split = open_images(Data(source=name, val_fraction=0, test_fraction=0.05)).train
        for position in (0, 17, 300):
            image = split.read(position)
            assert (image.size, image.mode) == ((8, 8), "RGB")
            want = np.round(images_NHW[split.source_index[position]] * (255 / 16))
            assert np.array_equal(np.asarray(image), np.repeat(want[:, :, None], 3, axis=2).astype(np.uint8))
        view = Views(split, Preprocess(32, 32), "none", False, 0).view(0, 0)
        assert (view.shape, view.dtype) == ((3, 32, 32), torch.uint8)


def test_printed_is_the_same_with_two_workers() -> None:
    split = open_images(Data(source="printed", val_fraction=0, test_fraction=0.05)).train
    views = Views(split, Preprocess(32, 32), "none", False, 0)

    def seen(workers: int) -> list[torch.Tensor]:
        return [batch["image"] for batch in eval_loader(views, Shard(), 16, 48, workers, False)]

    alone, together = seen(0), seen(2)
    assert len(alone) == 3
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert len(pickle.dumps(split.read)) < 10 * len(split), "workers are sent a seed, not rendered images"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_load_and_say_what_they_are(name: str) -> None:
    spec = Backbone(weights=f"shipped:{name}")
    card = find(spec, network=False).card
    assert card.name == name.removesuffix("-printed")
    assert (card.mean, card.std, card.size, card.resize) == ((0.5,) * 3, (0.5,) * 3, 32, 32)
    assert card.classes == source.classes()
    file = Path(factory.__file__).parent / "shipped" / f"{name}.safetensors"
    assert file.stat().st_size < 2_000_000
    assert file.stat().st_mode & 0o444 == 0o444, "an installed package is read by others than its owner"


@pytest.mark.parametrize(("name", "least"), [("resnet-tiny-printed", 0.96), ("vit-tiny-printed", 0.92)])
def test_shipped_weights_know_printed_characters(name: str, least: float) -> None:
    """On images beyond those of the source, which nothing was trained on or chosen by."""
    chain = factory.load(Backbone(weights=f"shipped:{name}"), classes=source.classes(), size=None, resize=None, head="keep", seed=0).chain
    reader = source.PrintedReader(source.SEED)
    numbers = np.arange(2 * source.NUM_IMAGES, 2 * source.NUM_IMAGES + 400)
    images = [np.asarray(reader(int(n)).resize((32, 32), 2)) for n in numbers]
    x_BCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        predicted = chain(x_BCHW).argmax(1).numpy()
    assert (predicted == source.labels(numbers, source.SEED)).mean() > least


def test_the_recipes_of_the_demo_are_whole(tmp_path: Path) -> None:
    arms = demo.arms(demo.demo_data(3), 3, tmp_path)
    assert len({arm.recipe.name for arm in arms}) == len({arm.title for arm in arms}) == 8
    for arm in arms:
        assert recipe.parse(arm.recipe.to_yaml(), "again") == arm.recipe
        chain = factory.skeleton(arm.recipe.backbone, 10, None, None).chain
        planned = stage_plan.plan(arm.recipe, chain, demo.NUM_LABELS, has_val=False)
        assert all(stage.spec.carry == "last" for stage in planned), "there is no val split to choose by"
        heads_only = arm.recipe.name.endswith("-head")
        assert (demo.num_trained(arm.recipe) == sum(p.numel() for p in chain.parameters())) != heads_only
    images = open_images(demo.demo_data(3))
    assert np.bincount(images.train.labels).tolist() == [demo.PER_CLASS] * 10
    assert images.val is None
    others = open_images(demo.demo_data(4))
    assert images.train.ids != others.train.ids


def test_an_arm_in_miniature(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arm = next(arm for arm in demo.arms(demo.demo_data(0), 0, tmp_path) if arm.recipe.name == "resnet-stages")
    short = arm.recipe.smoke()
    short = short.model_copy(update={"batch": 50, "data": short.data.model_copy(update={"eval_limit": 100})})
    outcome, said = demo.run_quietly(short, arm.path(tmp_path))
    assert outcome == "finished"
    assert "report" in said
    assert capfd.readouterr().out == ""
    figures = demo.read_figures(arm.path(tmp_path))
    assert figures["n"] == 100
    assert figures["top1"] > 0.2, "two steps a stage on shipped weights are better than chance"
    again, said = demo.run_quietly(short, arm.path(tmp_path))
    assert again == "finished"
    assert "finished already" in said


def test_the_demo_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arms = [replace(arm, recipe=arm.recipe.smoke()) for arm in demo.arms(demo.demo_data(0), 0, tmp_path)[1:3]]
    taken = iter(range(1, 10**6))

    def on_step(stage: str, step: int) -> None:
        if next(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def both(recipe: Recipe, start: RunFlags, shown: OnStep) -> dict[str, Any]:
        def each(stage: str, step: int) -> None:
            shown(stage, step)
            on_step(stage, step)

        return train(recipe, start, each)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "arms", lambda data, seed, out: arms)
        patch.setattr(demo, "train", both)
        assert demo.run_demo(tmp_path, 0) == "stopped"
        said = capsys.readouterr().out
        assert "1/2  ResNet, head only        top-1" in said
        assert "2/2  ResNet, in stages        stopped: the same command goes on from there" in said
        assert demo.run_demo(tmp_path, 0) == "finished"
    assert sum(1 for _ in (tmp_path / "resnet-head").glob("metrics-*.jsonl")) == 1, "what is finished is not trained again"
    said = capsys.readouterr().out.partition("95 % interval")[2]
    best = max(arms, key=lambda arm: demo.read_figures(arm.path(tmp_path))["top1"]).title
    assert said.splitlines()[1].startswith(best), "the table begins with the best"
    assert (tmp_path / "index.html").is_file()


def test_the_benchmark_draws_other_labels_and_keeps_the_test(tmp_path: Path) -> None:
    from benchmarks import demo_gain

    train, test = demo_gain.draw_from(tmp_path)
    opened = []
    for seed in (0, 1):
        arms = demo_gain.plan(tmp_path, train, test, seed, 5)
        assert {arm.recipe.name for arm in arms} >= {"resnet-full", "vit-full", *demo_gain.AGAINST.values()}
        opened.append(open_images(arms[0].recipe.data))
    first, second = opened
    assert np.bincount(first.train.labels).tolist() == np.bincount(second.train.labels).tolist() == [5] * 10
    assert set(first.train.ids) != set(second.train.ids)
    assert first.test is not None
    assert second.test is not None
    assert first.test.ids == second.test.ids
    assert not set(first.test.ids) & (set(first.train.ids) | set(second.train.ids))
    assert np.array_equal(np.asarray(first.test.read(7)), np.asarray(test.read(7)))
    mean, low, high = demo_gain.bootstrap([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert 0.1 <= low < mean < high <= 0.3


def test_the_commands_of_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import commands
    from benchmarks.__main__ import main as list_commands

    assert {"demo_gain", "pretrain"} <= set(commands())
    list_commands()
    assert "python -m benchmarks.demo_gain" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    page = tmp_path / "demo" / "index.html"
    assert str(page) in said
    assert "…" not in said, "the table fits into 80 columns"
    html = page.read_text(encoding="utf-8")
    figures: dict[str, dict[str, Any]] = {}
    for arm in demo.arms(demo.demo_data(0), 0, tmp_path / "demo"):
        assert (arm.title in html) == (arm.recipe.name not in demo.LONG)
        if arm.recipe.name in demo.LONG:
            continue
        figures[arm.recipe.name] = json.loads((arm.path(tmp_path / "demo") / "test_metrics.json").read_text())
        kept = yaml.safe_load((arm.path(tmp_path / "demo") / "recipe.yaml").read_text())
        assert kept["data"]["per_class"] == demo.PER_CLASS
    for way in ("stages", "head"):
        assert figures[f"resnet-{way}"]["top1"] > figures["resnet-scratch"]["top1"]
    assert figures["student-distilled"]["top1"] > figures["student-alone"]["top1"]
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0, "a second start shows the same again"
    assert capsys.readouterr().out.split("\n\n")[-2:] == said.split("\n\n")[-2:]
