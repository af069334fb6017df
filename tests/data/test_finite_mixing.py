"""Mixed views of a finite number: who is mixed with whom, where and how much follows from (seed, image, view) alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import made_recipe
from scipy.stats import beta, chisquare, kstest

from tltrain.core import stage_plan
from tltrain.data import open_images
from tltrain.data.loader import item_loader, train_loader, train_positions
from tltrain.data.mixing import apply_mixup, stage_views
from tltrain.data.sampler import FiniteMixing, SampleRef, SampleStream, Shard
from tltrain.data.views import Preprocess, Views
from tltrain.models import factory

NUM = 300
MIXING = FiniteMixing(seed=5, number_N=np.arange(1000, 1000 + NUM), mixup=0.4, cutmix=1.0, size=32)


def mixed(mixing: FiniteMixing, view: int = 3, num: int = NUM) -> list[SampleRef]:
    return mixing.mixed([SampleRef(i, view) for i in range(num)])


def test_a_mixed_view_depends_on_nothing_around_it() -> None:
    whole = mixed(MIXING)
    assert MIXING.mixed([SampleRef(i, 3) for i in (7, 299, 0, 7)]) == [whole[i] for i in (7, 299, 0, 7)]
    assert all((item.position, item.view, item.partner_view, item.weight) == (i, 3, 3, 1.0) for i, item in enumerate(whole))
    assert MIXING.mixed([SampleRef(0, 3, weight=0.0)]) == [whole[0]._replace(weight=0.0)]
    shifted = replace(MIXING, number_N=MIXING.number_N + 1)  # the image's number in its source counts, not its place in the split
    assert [(i.lam, i.box) for i in mixed(shifted)[:-1]] == [(i.lam, i.box) for i in whole[1:]]


def test_every_image_view_and_seed_is_mixed_otherwise() -> None:
    drawn = [(i.lam, i.partner) for view in range(4) for i in mixed(MIXING, view) if i.box is None]
    assert len(set(drawn)) == len(drawn) > 400
    others = [mixed(MIXING, 4), mixed(replace(MIXING, seed=6))]
    assert all(np.mean([a.partner == b.partner for a, b in zip(mixed(MIXING), other, strict=True)]) < 0.05 for other in others)


def test_these_views_are_mixed_as_they_were() -> None:
    """Rows that are stored of them are read by later versions too."""
    found = [(i.partner, round(i.lam, 6), i.box) for i in mixed(MIXING, 3, 4)]
    assert found == [(260, 0.863281, (0, 10, 10, 24)), (131, 0.340473, None), (172, 0.006032, None), (237, 0.21897, None)]


def test_partners_are_any_other_images_equally_often() -> None:
    small = replace(MIXING, number_N=np.arange(12))
    count_12 = np.zeros((12, 12))
    for view in range(600):
        for item in mixed(small, view, 12):
            count_12[item.position, item.partner] += 1
    assert (np.diag(count_12) == 0).all()
    assert chisquare(count_12[~np.eye(12, dtype=bool)]).pvalue > 1e-4
    alone = replace(MIXING, number_N=np.arange(1))
    assert mixed(alone, 1, 1)[0].partner == 0


def test_partners_are_drawn_by_weight() -> None:
    weight_N = np.array([1.0, 1.0, 2.0, 4.0])
    weighed = replace(MIXING, number_N=np.arange(4), weight_N=weight_N)
    partners = Counter(item.partner for view in range(4000) for item in mixed(weighed, view, 4) if item.position == 2)
    assert partners[2] == 0
    assert [partners[k] / 4000 for k in (0, 1, 3)] == pytest.approx([1 / 6, 1 / 6, 4 / 6], abs=0.03)


@pytest.mark.parametrize(("mixup", "cutmix", "share"), [(0.4, 0.0, 0.0), (0.0, 1.0, 1.0), (0.4, 1.0, 0.5)])
def test_shares_are_of_the_beta_distribution_and_each_view_draws_one_kind(mixup: float, cutmix: float, share: float) -> None:
    items = [item for view in range(10) for item in mixed(replace(MIXING, mixup=mixup, cutmix=cutmix), view)]
    blended = np.array([item.lam for item in items if item.box is None])
    assert 1 - len(blended) / len(items) == pytest.approx(share, abs=0.04)
    if mixup:
        assert kstest(blended, beta(mixup, mixup).cdf).pvalue > 1e-4
    for item in items:
        if item.box is not None:
            top, left, bottom, right = item.box
            assert item.lam == 1 - (bottom - top) * (right - left) / 32**2


def planned(**stage: object) -> tuple:  # type: ignore[type-arg]
    one = {"name": "one", "unfreeze": "head", "steps": 9, "lr": 0.01, "augment": "light", "mixup": 0.4, "cutmix": 1.0, "views": 3}
    recipe = made_recipe(stages=[one | stage])
    images = open_images(recipe.data)
    loaded = factory.skeleton(recipe.backbone, len(images.classes), 32, 32)
    return recipe, images.train, stage_plan.plan(recipe, loaded.chain, len(images.train), True)[0]


def test_a_stage_with_finite_views_mixes_by_view_and_another_by_step() -> None:
    recipe, split, plan = planned()
    mixing = stage_views(recipe, plan, split, Preprocess(32, 32)).mixing
    assert mixing is not None
    assert (mixing.seed, mixing.mixup, mixing.cutmix, mixing.size, mixing.weight_N) == (recipe.data.seed, 0.4, 1.0, 32, None)
    assert mixing.number_N is split.source_index
    for recipe, split, plan in (planned(views=None), planned(mixup=0, cutmix=0)):
        assert stage_views(recipe, plan, split, Preprocess(32, 32)).mixing is None
    assert stage_views(recipe, None, split, Preprocess(32, 32)).mixing is None


def test_a_balanced_epoch_has_balanced_partners() -> None:
    recipe, split, plan = planned()
    few = np.flatnonzero((split.labels != 3) | (np.cumsum(split.labels == 3) <= 1))
    balanced = recipe.model_copy(update={"data": recipe.data.model_copy(update={"balance": "sampler"})})
    unbalanced = replace(split, labels=split.labels[few], source_index=split.source_index[few], ids=[split.ids[i] for i in few])
    mixing = stage_views(balanced, plan, unbalanced, Preprocess(32, 32)).mixing
    assert mixing is not None
    labels = unbalanced.labels[[i.partner for view in range(40) for i in mixed(mixing, view, len(few))]]
    assert np.bincount(labels) / len(labels) == pytest.approx(0.1, abs=0.025)


def test_with_and_without_images_and_with_workers_the_mixture_is_one() -> None:
    recipe, split, plan = planned()
    views = stage_views(recipe, plan, split, Preprocess(32, 32))
    stream = SampleStream(0, 0, len(split), 10, 3, 0)
    where = (stream, 2, 9, Shard(1, 2, 2))
    for with_images, without in zip(
        train_loader(views, *where, 0, False), train_positions(split.labels, *where, views.mixing), strict=True
    ):
        assert {"partner_label", "lam"} <= without.keys() < with_images.keys()
        assert all(torch.equal(with_images[name], without[name]) for name in without)
        assert all(with_images[name].dtype == without[name].dtype for name in without)
    batches = [[SampleRef(i, v) for i in range(8)] for v in range(3)]
    for alone, shared in zip(item_loader(views, batches, 0, False), item_loader(views, batches, 2, False), strict=True):
        assert alone.keys() == shared.keys()
        assert all(torch.equal(alone[name], shared[name]) for name in alone)


def test_pixels_are_those_of_both_images_in_the_same_view() -> None:
    recipe, split, plan = planned()
    views, plain = stage_views(recipe, plan, split, Preprocess(32, 32)), Views(split, Preprocess(32, 32), "light", False, recipe.data.seed)
    assert views.mixing is not None
    items = views.mixing.mixed([SampleRef(i, 2) for i in range(20)])
    batch = apply_mixup(views.batch([SampleRef(i, 2) for i in range(20)]))
    assert {item.box is None for item in items} == {True, False}
    for n, item in enumerate(items):
        x, y = plain.view(n, 2).float() / 255, plain.view(item.partner, 2).float() / 255
        expected = item.lam * x + (1 - item.lam) * y
        if item.box is not None:
            top, left, bottom, right = item.box
            expected = x.clone()
            expected[:, top:bottom, left:right] = y[:, top:bottom, left:right]
        assert torch.allclose(batch["image"][n], expected, atol=1e-6)
        assert batch["partner_label"][n] == split.labels[item.partner]
