"""The preview shows what training sees: the same views, the same mixing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ALL, HEAD
from PIL import Image

from tltrain.commands.plan import preview
from tltrain.core import stage_plan
from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits, open_images
from tltrain.data.mixing import apply_mixup, stage_views
from tltrain.data.sampler import SampleRef, SampleStream
from tltrain.data.views import Preprocess, Views
from tltrain.models import factory
from tltrain.planning.preview import choose, columns
from tltrain.runs.pages.write import write_report

Made = Callable[..., Recipe]
STRONG = ALL | {"name": "strong", "augment": "strong", "views": 3, "steps": 30}


def planned(recipe: Recipe) -> tuple[DataSplits, Preprocess, list[StagePlan]]:
    images = open_images(recipe.data)
    loaded = factory.skeleton(recipe.backbone, len(images.classes), 32, 36)
    return images, loaded.preprocess, list(stage_plan.plan(recipe, loaded.chain, len(images.train), True))


def test_the_views_are_those_that_training_takes(made_recipe: Made) -> None:
    recipe = made_recipe(stages=[HEAD, ALL | {"steps": 30}, STRONG], data={"resize": 36})
    images, preprocess, plan = planned(recipe)
    chosen = choose(images.train, 6)
    assert len(set(chosen)) == 6
    assert len({images.train.labels[i] for i in chosen}) == 6
    for stage, num in zip(plan, (1, 4, 3), strict=True):
        found = columns(recipe, images.train, preprocess, stage, chosen, 4)
        assert len(found) == num
        n = len(images.train)
        stream = SampleStream(recipe.seed, stage.index, n, n, stage.spec.views, stage.first_epoch)  # an epoch of the training is one step
        views = Views(images.train, preprocess, stage.spec.augment, recipe.data.flip, recipe.data.seed)
        for epoch, column in enumerate(found):
            items = {item.position: item for item in stream.step(epoch)}
            for row, i in enumerate(chosen):
                np.testing.assert_array_equal(column.images[row], views[items[i]]["image"].permute(1, 2, 0).numpy())
            assert column.title == ("evaluation view" if items[chosen[0]].view == 0 or num == 1 else f"view {items[chosen[0]].view}")


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_are_made_of_the_rows_they_name(kind: str, made_recipe: Made) -> None:
    recipe = made_recipe(stages=[HEAD | {kind: 1.0, "steps": 6}])
    images, preprocess, plan = planned(recipe)
    chosen = choose(images.train, 5)
    views = Views(images.train, preprocess, "none", recipe.data.flip, recipe.data.seed)
    plain = [views.view(i, 0).permute(1, 2, 0).numpy().astype(float) for i in chosen]
    column = columns(recipe, images.train, preprocess, plan[0], chosen, 1)[0]
    for row, note in enumerate(column.notes):
        share, partner = (int(word) for word in note.replace(" % of row", "").split())
        lam = 1 - share / 100
        mixed, own, other = column.images[row].astype(float), plain[row], plain[partner - 1]
        if kind == "mixup":
            assert np.abs(mixed - lam * own - (1 - lam) * other).max() < 2
        else:
            from_other = (mixed != own).any(2)
            assert (mixed == np.where(from_other[..., None], other, own)).all()
            assert from_other.mean() <= 1 - lam + 0.006


def test_finite_mixed_views_are_mixed_as_training_mixes_them(made_recipe: Made) -> None:
    recipe = made_recipe(stages=[ALL | {"mixup": 1.0, "views": 2, "steps": 30}])
    images, preprocess, plan = planned(recipe)
    views = stage_views(recipe, plan[0], images.train, preprocess)
    chosen = choose(images.train, 5)
    found = columns(recipe, images.train, preprocess, plan[0], chosen, 4)
    assert len(found) == 2
    assert views.mixing is not None
    for view, column in enumerate(found):
        pixels = apply_mixup(views.batch([SampleRef(i, view) for i in chosen]))["image"].permute(0, 2, 3, 1)
        np.testing.assert_array_equal(column.images, (255 * pixels).round().byte().numpy())
        for note, item in zip(column.notes, views.mixing.mixed([SampleRef(i, view) for i in chosen]), strict=True):
            other = f"row {chosen.index(item.partner) + 1}" if item.partner in chosen else images.train.ids[item.partner]
            assert note == f"{100 * (1 - item.lam):.0f} % of {other}"


def test_one_picture_is_written_and_stands_in_the_report(made_recipe: Made, tmp_path: Path, finished_run: Path) -> None:
    out = preview(made_recipe(), tmp_path / "deep" / "p.png", rows=4)
    with Image.open(out) as picture:
        width, height = picture.size
    with Image.open(preview(made_recipe(), tmp_path / "q.png", rows=8)) as picture:
        assert picture.width == width
        assert picture.height > 1.5 * height
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(made_recipe().to_yaml())
    assert "What it sees" not in write_report(run).read_text()
    out.rename(run / "preview.png")
    assert "What it sees" in write_report(run).read_text()
    with pytest.raises(UserError, match="--rows is 0"):
        preview(made_recipe(), tmp_path / "r.png", rows=0)


def test_odd_names_are_drawn_as_they_are(made_recipe: Made, tmp_path: Path) -> None:
    for name in ("$x_2^", "d\x1b[31mg\n", "猫", "a" * 60):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (9, 7), (i, 50 * i, 9)).save(tmp_path / "images" / name / f"{i}.png")
    recipe = made_recipe(data={"source": f"folder:{tmp_path / 'images'}"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as matplotlib's, of glyphs that its font lacks
        assert preview(recipe, tmp_path / "p.png").stat().st_size > 1000
