"""How images are dealt into folds: evenly by class, whole groups, by the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tltrain.core.errors import UserError
from tltrain.data.splits import folds

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
