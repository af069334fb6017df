"""Heads worked out from features: the same as scikit-learn's, exact where they say so, and sane where data are not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV, RidgeCV
from torch import Tensor
from torch.nn import functional as F

from tltrain.core.errors import UserError
from tltrain.data.dataset import class_weights
from tltrain.heads import means, ridge
from tltrain.heads.scale import fit_scale
from tltrain.heads.solve import Kind, solve
from tltrain.heads.standardised import Basis, Scaling

KINDS: tuple[Kind, ...] = ("ridge", "logistic", "nearest_mean")


@dataclass(frozen=True)
class _Features:
    """Overlapping clouds, correlated and of uneven scale, as features of a network are."""

    x_ND: Tensor
    label_N: Tensor
    num_classes: int

    @property
    def target_NK(self) -> Tensor:
        return F.one_hot(self.label_N, self.num_classes).double()

    @property
    def ones_N(self) -> Tensor:
        return torch.ones(len(self.label_N), dtype=torch.float64)


def _features(num: int = 120, columns: int = 30, num_classes: int = 4, seed: int = 0, apart: float = 0.7) -> _Features:
    random = np.random.default_rng(seed)
    label_N = random.integers(0, num_classes, num)
    label_N[:num_classes] = range(num_classes)
    cloud_ND = random.normal(size=(num, columns)) + apart * random.normal(size=(num_classes, columns))[label_N]
    mixed_ND = cloud_ND @ random.normal(size=(columns, columns)) * np.exp(random.normal(size=columns)) + 3
    return _Features(torch.from_numpy(mixed_ND), torch.from_numpy(label_N), num_classes)


def _log_loss(head_logits_NK: Tensor, label_N: Tensor) -> float:
    return float(F.cross_entropy(head_logits_NK, label_N))


def _standardised(data: _Features, weight_N: Tensor | None = None) -> Tensor:
    return Scaling.of(data.x_ND, data.ones_N if weight_N is None else weight_N)(data.x_ND)


@pytest.mark.parametrize(("num", "columns"), [(150, 20), (40, 90)], ids=["tall", "wide"])
def test_ridge_is_that_of_scikit_learn(num: int, columns: int) -> None:
    data = _features(num, columns)
    z_ND = _standardised(data)
    strengths = [num * strength for strength in ridge.STRENGTHS]
    theirs = RidgeCV(alphas=strengths).fit(z_ND.numpy(), data.target_NK.numpy())
    classifier = RidgeClassifierCV(alphas=strengths).fit(z_ND.numpy(), data.label_N.numpy())  # targets of -1 and 1: twice the weights
    mine = solve("ridge", data.x_ND, data.label_N, data.num_classes)
    assert mine.strength == pytest.approx(theirs.alpha_, rel=1e-12) == pytest.approx(classifier.alpha_, rel=1e-12)
    basis = Basis.of(data.x_ND, Scaling.of(data.x_ND, data.ones_N), data.ones_N)
    weight_KD, bias_K = ridge.coefficients(basis, data.target_NK, data.ones_N, float(theirs.alpha_))
    np.testing.assert_allclose(weight_KD, theirs.coef_, rtol=0, atol=1e-10 * np.abs(theirs.coef_).max())
    np.testing.assert_allclose(bias_K, theirs.intercept_, rtol=0, atol=1e-10)
    np.testing.assert_allclose(2 * weight_KD, classifier.coef_, rtol=0, atol=1e-10 * np.abs(classifier.coef_).max())
    theirs_NK = theirs.predict(z_ND.numpy())  # mine are the same scores of plain features, times one factor
    mine_NK = mine.logits(data.x_ND)
    factor = float((mine_NK - mine_NK.mean(1, keepdim=True)).norm() / np.linalg.norm(theirs_NK - theirs_NK.mean(1, keepdims=True)))
    np.testing.assert_allclose(mine_NK, factor * theirs_NK, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("num", "columns"), [(40, 12), (25, 60)], ids=["tall", "wide"])
def test_leave_one_out_is_exact(num: int, columns: int) -> None:
    data = _features(num, columns, 3)
    weight_N = torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.2
    scaling = Scaling.of(data.x_ND, weight_N)
    z_ND, strengths = scaling(data.x_ND), torch.tensor([0.5, 20.0], dtype=torch.float64)
    blocks = list(ridge.left_out(Basis.of(data.x_ND, scaling, weight_N), data.target_NK, weight_N, strengths))
    unseen_SNK = torch.cat([block for _, block in blocks], 1)
    for s, strength in enumerate(strengths.tolist()):
        for i in range(num):
            rest_N = torch.arange(num) != i
            own_N1 = (weight_N[rest_N] / weight_N[rest_N].sum())[:, None]
            mean_D, mean_K = (own_N1 * z_ND[rest_N]).sum(0), (own_N1 * data.target_NK[rest_N]).sum(0)
            c_ND, root_N1 = z_ND[rest_N] - mean_D, weight_N[rest_N, None].sqrt()
            system = (root_N1 * c_ND).T @ (root_N1 * c_ND) + strength * torch.eye(columns)
            by_hand_DK = torch.linalg.solve(system, (root_N1 * c_ND).T @ (root_N1 * (data.target_NK[rest_N] - mean_K)))
            torch.testing.assert_close(unseen_SNK[s, i], mean_K + (z_ND[i] - mean_D) @ by_hand_DK, rtol=0, atol=1e-9)


def test_a_fold_left_out_is_exact() -> None:
    data = _features(50, 20, 3)
    scaling, held_N = Scaling.of(data.x_ND, data.ones_N), torch.arange(7, 19)
    basis = Basis.of(data.x_ND, scaling, data.ones_N)
    mine_BK = ridge.WithoutFold.of(basis, data.target_NK, data.ones_N, held_N).scores(basis.rows_NR[held_N], 3.0)
    rest = _Features(data.x_ND, data.label_N, 3)
    rest_N = torch.ones(50, dtype=torch.bool).scatter(0, held_N, False)
    z_ND = scaling(rest.x_ND)
    theirs = RidgeCV(alphas=[3.0]).fit(z_ND[rest_N].numpy(), data.target_NK[rest_N].numpy())
    np.testing.assert_allclose(mine_BK, theirs.predict(z_ND[held_N].numpy()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize(("num", "columns"), [(150, 20), (60, 90)], ids=["tall", "wide"])
def test_logistic_is_that_of_scikit_learn(num: int, columns: int, num_classes: int) -> None:
    data = _features(num, columns, num_classes)
    mine = solve("logistic", data.x_ND, data.label_N, num_classes)
    assert mine.strength is not None
    z_ND = _standardised(data).numpy()
    c = (2 if num_classes == 2 else 1) / mine.strength  # theirs has one weight for two classes, and ours two, half as long each
    theirs = LogisticRegression(C=c, tol=1e-12, max_iter=50_000).fit(z_ND, data.label_N.numpy())
    coef_KD, intercept_K = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
    if num_classes == 2:
        coef_KD, intercept_K = torch.cat([-coef_KD, coef_KD]) / 2, torch.cat([-intercept_K, intercept_K]) / 2
    theirs_NK = torch.from_numpy(z_ND) @ coef_KD.T + intercept_K
    assert _log_loss(mine.logits(data.x_ND), data.label_N) == pytest.approx(_log_loss(theirs_NK, data.label_N), abs=1e-6)
    scaled_KD = mine.weight_KD * data.x_ND.std(0, correction=0)

    def objective(logits_NK: Tensor, weight_KD: Tensor) -> float:
        return len(z_ND) * _log_loss(logits_NK, data.label_N) + float(mine.strength or 0) / 2 * float(weight_KD.square().sum())

    assert objective(mine.logits(data.x_ND), scaled_KD) == pytest.approx(objective(theirs_NK, coef_KD), abs=1e-6)


def test_the_nearest_mean_is_the_nearest() -> None:
    data = _features(90, 10, 3)
    head, z_ND = solve("nearest_mean", data.x_ND, data.label_N, 3), _standardised(data)
    mean_KD = torch.stack([z_ND[data.label_N == c].mean(0) for c in range(3)])
    assert torch.equal(head.logits(data.x_ND).argmax(1), torch.cdist(z_ND, mean_KD).argmin(1))
    score_NK, others_N = means.left_out(z_ND, data.target_NK, data.ones_N)
    assert bool(others_N.all())
    for i in (0, 7, 50):
        rest_N = torch.arange(90) != i
        own_KD = torch.stack([z_ND[rest_N & (data.label_N == c)].mean(0) for c in range(3)])
        torch.testing.assert_close(score_NK[i], z_ND[i] @ own_KD.T - own_KD.square().sum(1) / 2, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_two_is_the_image_twice_and_of_none_its_absence(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _features(60, 12, 3)
    weight_N = torch.ones(60, dtype=torch.float64)
    weight_N[:10], weight_N[10:14] = 2.0, 0.0
    seen = torch.cat([torch.arange(10), torch.arange(10), torch.arange(14, 60)])
    strength = 6.0
    monkeypatch.setattr(ridge, "STRENGTHS", (strength / 66,))
    monkeypatch.setattr("tltrain.heads.logistic.STRENGTHS", (strength / 66,))
    mine = solve(kind, data.x_ND, data.label_N, 3, weight_N=weight_N)
    twice = solve(kind, data.x_ND[seen], data.label_N[seen], 3)
    ratio = mine.weight_KD.norm() / twice.weight_KD.norm()  # the scale is found by leaving images out, where a twin is not left out
    torch.testing.assert_close(mine.weight_KD / ratio, twice.weight_KD, rtol=1e-6, atol=1e-7)


def test_class_weights_raise_the_rare_class() -> None:
    data = _features(200, 8, 2, apart=0.25)
    kept_N = (data.label_N == 0) | (torch.arange(200) % 8 == 0)
    x_ND, label_N = data.x_ND[kept_N], data.label_N[kept_N]
    weight_K = torch.from_numpy(class_weights(label_N.numpy(), 2))
    for kind in ("ridge", "logistic"):
        plain, weighed = (solve(kind, x_ND, label_N, 2, weight_N=w).logits(x_ND).argmax(1) for w in (None, weight_K[label_N]))
        recall, balanced = ((found[label_N == 1] == 1).double().mean() for found in (plain, weighed))
        assert balanced > recall + 0.2, kind


def test_scores_of_ridge_become_probabilities_that_hold() -> None:
    data = _features(1500, 20, 4, apart=0.5)
    half = 500
    head = solve("ridge", data.x_ND[:half], data.label_N[:half], 4)
    logits_NK, label_N = head.logits(data.x_ND[half:]), data.label_N[half:]
    best = min(_log_loss(factor * logits_NK, label_N) for factor in np.linspace(0.3, 3, 55))
    assert _log_loss(logits_NK, label_N) < best + 0.01
    confidence_N, predicted_N = logits_NK.softmax(1).max(1)
    assert abs(float(confidence_N.mean()) - float((predicted_N == label_N).double().mean())) < 0.06
    raw = RidgeCV(alphas=[head.strength]).fit(data.x_ND[:half], data.target_NK[:half]).predict(data.x_ND[half:])
    assert _log_loss(torch.from_numpy(raw), label_N) > best + 0.2, "scores of one-hot targets are no logits"


def test_the_factor_of_scores_is_where_the_loss_is_least() -> None:
    data = _features(80, 10, 3)
    score_NK = torch.randn(80, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.2 * data.target_NK
    factor = fit_scale(score_NK, data.label_N, data.ones_N)
    assert factor is not None
    smoothed_NK = (data.target_NK * 80 + 1) / 83

    def loss(f: float) -> float:
        return float(-(smoothed_NK * (f * score_NK).log_softmax(1)).sum())

    assert loss(factor) <= min(loss(factor * (1 - 1e-4)), loss(factor * (1 + 1e-4)))
    sure = fit_scale(100 * data.target_NK, data.label_N, data.ones_N)
    assert sure is not None
    assert np.isfinite(sure), "right everywhere is not certain everywhere"
    assert fit_scale(-data.target_NK, data.label_N, data.ones_N) is None
    assert fit_scale(torch.zeros(80, 3, dtype=torch.float64), data.label_N, data.ones_N) is None


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_features_give_a_sane_head(kind: Kind) -> None:
    data = _features(40, 6, 3)
    constant_ND = data.x_ND.clone()
    constant_ND[:, 2] = 0.1
    head = solve(kind, constant_ND.float(), data.label_N, 3)
    assert bool(torch.isfinite(head.weight_KD).all())
    assert not bool(head.weight_KD[:, 2].any()), "a constant column has no say"
    same = solve(kind, torch.full((40, 6), 0.3), data.label_N, 3)
    assert bool(torch.isfinite(same.logits(torch.full((2, 6), 0.3))).all())
    assert any("the same" in note for note in same.notes)
    if kind != "nearest_mean":
        assert int(same.bias_K.argmax()) == int(torch.bincount(data.label_N).argmax())
    label_N = torch.where(torch.arange(40) == 0, 2, data.label_N.clamp_max(1))
    single = solve(kind, data.x_ND, label_N, 5)
    logits_NK = single.logits(torch.cat([data.x_ND, 50 * torch.randn(500, 6, dtype=torch.float64)]))
    assert bool(torch.isfinite(logits_NK).all())
    assert set(logits_NK.argmax(1).tolist()) <= {0, 1, 2}, "classes 3 and 4 have no image"
    one = solve(kind, data.x_ND, torch.zeros(40, dtype=torch.int64), 2)
    assert set(one.logits(data.x_ND).argmax(1).tolist()) == {0}
    two = solve(kind, data.x_ND[:2], torch.tensor([0, 1]), 2)
    assert two.logits(data.x_ND[:2]).argmax(1).tolist() == [0, 1]
    alone = solve(kind, data.x_ND, data.label_N, 3, group_N=torch.zeros(40, dtype=torch.int64))
    assert bool(torch.isfinite(alone.weight_KD).all())


def test_features_that_are_not_finite_are_refused() -> None:
    data = _features(20, 4, 2)
    data.x_ND[3, 1] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        solve("ridge", data.x_ND, data.label_N, 2)
    with pytest.raises(UserError, match="no images"):
        solve("ridge", data.x_ND, data.label_N, 2, weight_N=torch.zeros(20))


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_belong_together_are_left_out_together(kind: Kind) -> None:
    """Five copies of each image with noise: leaving out one copy says nothing, and the weakest penalty would look best."""
    data = _features(60, 40, 3, apart=0.25)
    noise = 0.01 * torch.randn(300, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_ND, label_N, group_N = data.x_ND.repeat(5, 1) + noise, data.label_N.repeat(5), torch.arange(60).repeat(5)
    alone, together = solve(kind, x_ND, label_N, 3), solve(kind, x_ND, label_N, 3, group_N=group_N)
    fresh = _features(1000, 40, 3, apart=0.25)
    if kind == "nearest_mean":
        assert together.weight_KD.norm() < alone.weight_KD.norm(), "less sure of itself"
    else:
        assert together.strength is not None
        assert alone.strength is not None
        assert together.strength > 5 * alone.strength
        assert _log_loss(together.logits(fresh.x_ND), fresh.label_N) < _log_loss(alone.logits(fresh.x_ND), fresh.label_N)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_do_not_depend_on_the_number_of_threads(kind: Kind) -> None:
    data, before = _features(400, 90, 4), torch.get_num_threads()
    heads = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            heads.append(solve(kind, data.x_ND.float(), data.label_N, 4))
            assert torch.get_num_threads() == threads, "threads are restored"
    finally:
        torch.set_num_threads(before)
    assert torch.equal(heads[0].weight_KD, heads[1].weight_KD)
    assert torch.equal(heads[0].bias_K, heads[1].bias_K)
