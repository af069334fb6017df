"""Properties of the order: what is covered, what depends on what, and how fast a position is found."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tltrain.data import class_weights, sampler
from tltrain.data.loader import StepSampler, eval_batches
from tltrain.data.sampler import SampleRef, SampleStream, Shard, derive_seed, micro_batches, num_micro, rank_slice, shuffled, uniform
from tltrain.data.splits import cut, keep_per_class

small = st.integers(1, 40)
quick = settings(max_examples=60, deadline=None)  # a busy machine is no failure


def _items(stream: SampleStream, num_steps: int) -> list[SampleRef]:
    return [item for s in range(num_steps) for item in stream.step(s)]


@quick
@given(n=small, batch=small, stage=st.integers(0, 3), seed=st.integers(0, 5))
def test_each_epoch_is_a_permutation_and_no_batch_is_short(n: int, batch: int, stage: int, seed: int) -> None:
    stream = SampleStream(seed, stage, n, batch, None, 7)
    num_steps = -(-3 * n // batch)
    items = _items(stream, num_steps)
    assert all(len(stream.step(s)) == batch for s in range(num_steps))
    for epoch in range(3):
        part = items[epoch * n : (epoch + 1) * n]
        assert sorted(item.position for item in part) == list(range(n))
        assert {item.view for item in part} == {1 + 7 + epoch}


@quick
@given(n=small, batch=small, views=st.integers(1, 4))
def test_finite_views_come_in_turn(n: int, batch: int, views: int) -> None:
    items = _items(SampleStream(0, 0, n, batch, views, 7), -(-3 * n // batch))
    assert [item.view for item in items[: 3 * n]] == [i // n % views for i in range(3 * n)]


@quick
@given(n=small, batch=small, world=st.integers(1, 9), device=st.integers(1, 9), step=st.integers(0, 5), mixup=st.sampled_from([0.0, 0.4]))
def test_any_world_covers_the_global_batch_once(n: int, batch: int, world: int, device: int, step: int, mixup: float) -> None:
    stream = SampleStream(0, 1, n, batch, None, 0, mixup=mixup)
    num = num_micro(batch, world, device)
    seen: list[SampleRef] = []
    for rank in range(world):
        micro = list(StepSampler(stream, step, step + 1, Shard(rank, world, num)))
        assert len(micro) == num
        assert all(1 <= len(part) <= device for part in micro)
        seen += [item for part in micro for item in part if item.weight == 1]
        assert all(item.weight in (0, 1) for part in micro for item in part)
    assert seen == stream.step(step)


@quick
@given(batch=st.integers(0, 100), world=st.integers(1, 20))
def test_slices_are_even_to_one(batch: int, world: int) -> None:
    sizes = [len(range(batch)[rank_slice(batch, rank, world)]) for rank in range(world)]
    assert sum(sizes) == batch
    assert max(sizes) - min(sizes) <= 1


def test_an_empty_micro_batch_is_filled_without_weight() -> None:
    parts = micro_batches([SampleRef(5, 1), SampleRef(6, 1)], 3)
    assert sorted(parts) == [[SampleRef(5, 1, 0.0)], [SampleRef(5, 1)], [SampleRef(6, 1)]]


def test_the_position_is_found_without_what_stands_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(seed: int, num: int) -> np.ndarray:
        drawn.append(seed)
        return shuffled(seed, num)

    monkeypatch.setattr(sampler, "shuffled", counted)
    stream = SampleStream(0, 0, 50_000, 512, None, 0, mixup=0.2)
    far = stream.step(10_000_000)
    assert drawn == [derive_seed(0, "order", 0, 102_400)]
    before = SampleStream(0, 0, 50_000, 512, None, 0, mixup=0.2)
    before.step(9_999_999)
    assert before.step(10_000_000) == far  # whatever was asked for before


def test_order_is_the_same_on_every_version() -> None:
    """Frozen: a change here changes every run that is resumed."""
    assert derive_seed(0, "order", 1, 2) == 9063001024455624354
    assert shuffled(derive_seed(0, "order", 0, 0), 8).tolist() == [5, 0, 3, 1, 4, 7, 6, 2]
    assert uniform(3, 2).tolist() == [0.08564916714362436, 0.2368105065960997]


def test_keys_tell_their_parts_apart() -> None:
    assert (
        len({derive_seed(1, 23), derive_seed(12, 3), derive_seed("1", 23), derive_seed(123), derive_seed("1,23"), derive_seed(1, "23")})
        == 6
    )
    assert derive_seed(np.int64(4), "a") == derive_seed(4, "a")  # type: ignore[arg-type]
    assert 0 <= derive_seed(1) < 2**63


def test_stages_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        [item.position for item in SampleStream(seed, stage, 30, 30, None, 0).step(s)]
        for seed in (0, 1)
        for stage in (0, 1)
        for s in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 8


@quick
@given(batch=st.integers(2, 40), n=small, alpha=st.sampled_from([0.1, 1.0, 3.0]), step=st.integers(0, 9))
def test_mixup_partners_are_of_the_same_batch(batch: int, n: int, alpha: float, step: int) -> None:
    plain = SampleStream(0, 0, n, batch, None, 0).step(step)
    apply_mixup = SampleStream(0, 0, n, batch, None, 0, mixup=alpha).step(step)
    assert [(m.position, m.view) for m in apply_mixup] == [(p.position, p.view) for p in plain]
    assert Counter((m.partner, m.partner_view) for m in apply_mixup) == Counter((p.position, p.view) for p in plain)
    assert all(0 <= m.lam <= 1 and m.box is None and m.weight == 1 for m in apply_mixup)
    if batch <= n and step == 0:
        assert all(m.partner != m.position for m in apply_mixup)


def test_lam_is_beta_distributed() -> None:
    lam = np.array([item.lam for item in SampleStream(0, 0, 100, 4000, None, 0, mixup=0.4).step(0)])
    assert abs(lam.mean() - 0.5) < 0.03
    assert abs(lam.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.01  # the variance of Beta(a, a)


@quick
@given(alpha=st.sampled_from([0.2, 1.0, 5.0]), size=st.sampled_from([8, 31, 224]), step=st.integers(0, 9))
def test_cutmix_boxes_tell_the_share_exactly(alpha: float, size: int, step: int) -> None:
    for item in SampleStream(0, 0, 50, 16, None, 0, cutmix=alpha, size=size).step(step):
        assert item.box is not None
        inside = np.zeros((size, size), bool)
        inside[item.box[0] : item.box[2], item.box[1] : item.box[3]] = True
        assert item.lam == pytest.approx(1 - inside.mean(), abs=1e-12)
        assert inside.any() or item.box == (0, 0, 0, 0)


def test_with_both_each_batch_draws_one() -> None:
    stream = SampleStream(0, 0, 100, 8, None, 0, mixup=0.2, cutmix=1.0, size=32)
    kinds = [{item.box is None for item in stream.step(s)} for s in range(60)]
    assert all(len(kind) == 1 for kind in kinds)
    assert 15 < sum(kind == {True} for kind in kinds) < 45


def test_with_both_a_batch_is_that_of_the_one_it_draws() -> None:
    """Each with its own alpha."""
    both, mixup, cutmix = (SampleStream(0, 0, 100, 8, None, 0, mixup=m, cutmix=c, size=32) for m, c in ((0.2, 1.0), (0.2, 0), (0, 1.0)))
    for s in range(40):
        assert both.step(s) == (mixup if both.step(s)[0].box is None else cutmix).step(s)


def test_balanced_draws() -> None:
    labels = np.array([0] * 900 + [1] * 100)
    weights = class_weights(labels, 2)
    stream = SampleStream(0, 0, 1000, 1000, None, 0, tuple(weights[labels]))
    items = stream.step(0)
    assert abs(sum(labels[item.position] == 1 for item in items) - 500) < 60
    assert len({(item.position, item.view) for item in items}) == 1000  # drawn again is seen again, in another view
    assert not {(item.position, item.view) for item in items} & {(item.position, item.view) for item in stream.step(1)}
    cycled = SampleStream(0, 0, 1000, 1000, 3, 0, tuple(weights[labels])).step(0)
    assert {item.view for item in cycled} == {0, 1, 2}


def test_a_sample_of_weight_zero_is_never_drawn() -> None:
    items = SampleStream(0, 0, 4, 500, None, 0, (0.0, 1.0, 0.0, 1.0)).step(0)
    assert {item.position for item in items} == {1, 3}


@quick
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_class_weights_are_one_on_average(labels: list[int]) -> None:
    label_N = np.array(labels)
    weight_K = class_weights(label_N, 5)
    assert weight_K[label_N].mean() == pytest.approx(1)
    totals = [weight_K[c] * (label_N == c).sum() for c in set(labels)]
    assert max(totals) == pytest.approx(min(totals))


@quick
@given(n=st.integers(1, 60), world=st.integers(1, 9), batch=st.integers(1, 20), limit=st.none() | st.integers(1, 70))
def test_evaluation_sees_every_sample_once(n: int, world: int, batch: int, limit: int | None) -> None:
    per_rank = [eval_batches(n, Shard(rank, world), batch, limit) for rank in range(world)]
    shapes = {tuple(len(part) for part in batches) for batches in per_rank}
    assert len(shapes) == 1
    assert max(shapes.pop()) <= batch
    items = [item for batches in per_rank for part in batches for item in part]
    counted = [item.position for item in items if item.weight == 1]
    assert len(counted) == len(set(counted)) == min(n, limit or n)
    assert all(item.view == 0 and 0 <= item.position < n for item in items)


def test_a_limited_evaluation_is_spread_over_the_split() -> None:
    items = [item.position for part in eval_batches(1000, Shard(), 64, 10) for item in part]
    assert items == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]


# --- splits


@quick
@given(data=st.data(), fraction=st.floats(0.05, 0.6), seed=st.integers(0, 9))
def test_a_cut_is_stratified(data: st.DataObject, fraction: float, seed: int) -> None:
    labels = np.array(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=120)))
    leaves = cut(labels, np.arange(len(labels)), fraction, seed)
    for c in np.unique(labels):
        n, gone = (labels == c).sum(), leaves[labels == c].sum()
        assert gone < n
        assert abs(gone - fraction * n) <= 1
        assert gone >= 1 or n == 1


@quick
@given(data=st.data(), fraction=st.floats(0.05, 0.6), seed=st.integers(0, 9))
def test_a_cut_never_parts_a_group(data: st.DataObject, fraction: float, seed: int) -> None:
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=120))
    labels, groups = np.array(pairs).T
    leaves = cut(labels, groups, fraction, seed)
    for group in np.unique(groups):
        assert leaves[groups == group].all() or not leaves[groups == group].any()
    assert set(labels[~leaves]) == set(labels)


def test_groups_that_mix_classes_still_give_the_fraction() -> None:
    rng = np.random.default_rng(0)
    groups, labels = rng.integers(0, 200, 2000), rng.integers(0, 3, 2000)
    leaves = cut(labels, groups, 0.2, 0)
    for c in range(3):
        assert abs(leaves[labels == c].mean() - 0.2) < 0.03


@quick
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), num=st.integers(1, 20))
def test_per_class_is_exact(labels: list[int], num: int) -> None:
    label_N = np.array(labels)
    kept = keep_per_class(label_N, num, 0)
    assert kept.tolist() == sorted(set(kept.tolist()))
    for c in set(labels):
        assert (label_N[kept] == c).sum() == min(num, (label_N == c).sum())


def test_seeds_keep_other_samples() -> None:
    kept = {tuple(keep_per_class(np.arange(100) % 2, 5, seed).tolist()) for seed in range(8)}
    assert len(kept) == 8
