"""How images are dealt into folds: evenly by class, whole groups, by the seed alone. And the splits of a fold of a recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, Source, open_images
from tltrain.data.splits import folds, split, split_names

quick = settings(max_examples=80, deadline=None)


@quick
@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=60), k=st.integers(2, 7), seed=st.integers(0, 5))
def test_single_images_are_dealt_within_one(labels: list[int], k: int, seed: int) -> None:
    label_N = np.array(labels)
    k = min(k, len(labels))
    fold_N = folds(label_N, np.arange(len(labels)), k, seed)
    assert fold_N.shape == label_N.shape
    assert fold_N.dtype == np.int64
    for kept in (fold_N, *(fold_N[label_N == c] for c in set(labels))):
        size_F = np.bincount(kept, minlength=k)
        assert len(size_F) == k
        assert size_F.max() - size_F.min() <= 1


@quick
@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=4), k=st.integers(2, 5), seed=st.integers(0, 3))
def test_a_group_is_never_parted_and_no_fold_is_empty(pairs: list[tuple[int, int]], k: int, seed: int) -> None:
    label_N, group_N = np.array(pairs).T
    num_groups = len(np.unique(group_N))
    if num_groups < k:
        with pytest.raises(UserError, match=f"{len(pairs)} images make {num_groups} group"):
            folds(label_N, group_N, k, seed)
        return
    fold_N = folds(label_N, group_N, k, seed)
    assert all(len(set(fold_N[group_N == g].tolist())) == 1 for g in set(group_N.tolist()))
    assert set(fold_N.tolist()) == set(range(k))


def test_patients_are_spread_as_evenly_as_they_allow() -> None:
    # Ten patients of class 0 with 20 to 2 images and single images of class 1: five folds can have 22 and 8 of each, and do.
    label_N = np.repeat([0, 1], [110, 40])
    group_N = np.concatenate([np.repeat(np.arange(10), np.arange(20, 0, -2)), np.arange(10, 50)])
    for seed in range(5):
        fold_N = folds(label_N, group_N, 5, seed)
        assert [np.bincount(fold_N[label_N == c]).tolist() for c in (0, 1)] == [[22] * 5, [8] * 5]


def test_a_rare_class_is_not_outweighed_by_the_images_of_a_frequent_one() -> None:
    # Two patients have the rare class, beside many images of the other: in one fold they would leave none to learn from.
    for seed in range(20):
        sizes = np.random.default_rng(seed).integers(20, 60, 8)
        label_N = np.concatenate([np.zeros(sizes.sum(), int), [1, 1]])
        group_N = np.concatenate([np.repeat(np.arange(8), sizes), [0, 1]])
        fold_N = folds(label_N, group_N, 2, seed)
        assert fold_N[-1] != fold_N[-2]


def test_the_seed_decides_and_nothing_else() -> None:
    label_N, group_N = np.arange(90) % 3, np.arange(90)
    first = folds(label_N, group_N, 5, 0)
    assert (folds(label_N.copy(), group_N.copy(), 5, 0) == first).all()
    assert (folds(label_N, group_N * 10 + 3, 5, 0) == first).all(), "groups are told apart by equality, not by their numbers"
    others = [folds(label_N, group_N, 5, seed) for seed in range(1, 5)]
    assert all((other != first).mean() > 0.5 for other in others)
    assert first.tolist()[:12] == [0, 1, 2, 0, 2, 0, 3, 0, 4, 2, 3, 0], "another order would change the folds of runs that exist"


@pytest.mark.parametrize(("k", "message"), [(1, "parted into 1 folds: give 2 or more"), (0, "2 or more"), (7, "6 images make 6 groups")])
def test_what_is_no_number_of_folds(k: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        folds(np.array([0, 0, 0, 1, 1, 1]), np.arange(6), k, 0)


def _spec(fold: int = 0, **changes: Any) -> Data:
    return Data(**{"source": "digits", "folds": 5, "fold": fold, **changes})


@pytest.fixture(scope="module")
def source() -> Source:
    """60 of scikit-learn's digits, in groups of two."""
    whole = open_images(Data(source="digits")).source
    assert whole is not None
    few = np.concatenate([np.flatnonzero(whole.labels == k)[:6] for k in range(10)])
    ids = tuple(whole.ids[i] for i in few)
    return replace(
        whole, labels=whole.labels[few], ids=ids, numbers=whole.numbers[few], declared=whole.declared[few], groups=np.arange(60) // 2
    )


def _ids(images: DataSplits, name: str) -> set[str]:
    part = getattr(images, name)
    return set() if part is None else set(part.ids)


@pytest.mark.parametrize("repeat", [0, 1])
def test_every_image_is_tested_by_one_fold_and_learned_by_none_of_that(source: Source, repeat: int) -> None:
    tested: list[str] = []
    for fold in range(3):
        images = split(source, _spec(fold, folds=3, repeat=repeat, val_fraction=0.4))
        parts = [_ids(images, name) for name in ("train", "val", "test")]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 60
        group_of = dict(zip(source.ids, source.groups.tolist(), strict=True))
        groups = [{group_of[i] for i in part} for part in parts]
        assert not groups[0] & groups[2]
        assert not groups[0] & groups[1]
        assert not groups[1] & groups[2]
        assert np.bincount(images.test.labels, minlength=10).tolist() == [2] * 10 if images.test is not None else False
        assert images.val is not None
        tested += parts[2]
    assert sorted(tested) == sorted(source.ids)


def test_the_seed_and_the_repeat_draw_the_folds_and_the_views_stay(source: Source) -> None:
    first, again, other, repeat = (
        split(source, spec) for spec in (_spec(folds=3, val_fraction=0, **more) for more in ({}, {}, {"seed": 1}, {"repeat": 1}))
    )
    assert _ids(first, "test") == _ids(again, "test")
    assert _ids(first, "test") != _ids(other, "test")
    assert _ids(first, "test") != _ids(repeat, "test")
    assert first.fingerprint == again.fingerprint != repeat.fingerprint


def test_what_the_source_declares_stays_what_it_is(source: Source) -> None:
    declared = np.array(["train", "train", "train", "train", "val", "test"] * 10)
    images = split(replace(source, declared=declared), _spec(folds=2, val_fraction=0.5))
    assert _ids(images, "val") == set(source.ids[4::6]), "val is the source's own, and none is cut beside it"
    own = {name for name, part in zip(source.ids, declared.tolist(), strict=True) if part == "train"}
    assert _ids(images, "train") | _ids(images, "test") == own
    assert len(_ids(images, "test")) == 20
    assert set(split_names(images)[5::6]) == {""}, "in no split: they are seen when everything is decided"
    assert "10 images that the source declares as test are left out" in "\n".join(images.notes)


def test_classes_that_no_fold_could_learn_or_some_fold_cannot_test(source: Source) -> None:
    images = split(source, _spec(folds=5, val_fraction=0))
    assert any("for 5 folds, so that some folds test none of class 0 (6), 1 (6)" in note for note in images.notes)
    one_patient = replace(source, groups=np.where(source.labels == 3, 1000, source.groups))
    with pytest.raises(UserError, match=r"digits: all images of class 3 \(6\) lie in one fold"):
        split(one_patient, _spec(folds=5))
    with pytest.raises(UserError, match="parted into 31 folds: 60 images make 30 groups"):
        split(source, _spec(folds=31))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"folds": 5}, "folds and fold stand together"),
        ({"fold": 0}, "folds and fold stand together"),
        ({"folds": 5, "fold": 5}, "fold is 5, and the 5 folds are counted from 0; the last one is 4"),
        ({"folds": 1, "fold": 0}, "greater than or equal to 2"),
        ({"repeat": 1}, "repeat is 1, and there are no folds"),
    ],
)
def test_a_recipe_that_names_no_fold(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Data(source="digits", **values)
