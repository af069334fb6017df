"""Heads of several labels: those of scikit-learn's one-vs-rest, and probabilities that hold."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier, RidgeCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from tltrain.heads import ridge
from tltrain.heads.logistic import STRENGTHS
from tltrain.heads.out_of_fold import out_of_fold
from tltrain.heads.scale import fit_lines
from tltrain.heads.solve import Kind, solve


def _features(num: int = 200, columns: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(features (N, D), labels (N, 4) of different frequency, none and all of them among the images)."""
    random = np.random.default_rng(seed)
    x_ND = random.normal(size=(num, columns)) @ random.normal(size=(columns, columns)) + 3
    logit_NK = StandardScaler().fit_transform(x_ND) @ random.normal(size=(columns, 4)) + (0, 1, -1, -3)
    return x_ND, (random.random((num, 4)) < 1 / (1 + np.exp(-logit_NK))).astype(np.int64)


@pytest.mark.parametrize("columns", [12, 260], ids=["tall", "wide"])
def test_ridge_of_labels_is_that_of_scikit_learn(columns: int) -> None:
    x_ND, label_NK = _features(columns=columns)
    z_ND = StandardScaler().fit_transform(x_ND)
    mine = solve("ridge", torch.from_numpy(x_ND), label_NK, 4)
    strengths = [len(x_ND) * strength for strength in ridge.STRENGTHS]
    assert mine.strength == pytest.approx(RidgeCV(alphas=strengths).fit(z_ND, label_NK).alpha_, rel=1e-12)
    assert mine.strength is not None
    theirs = Ridge(alpha=mine.strength).fit(z_ND, label_NK).predict(z_ND)
    classifier = RidgeClassifier(alpha=mine.strength).fit(z_ND, label_NK).decision_function(z_ND)
    np.testing.assert_allclose(2 * theirs - 1, classifier, atol=1e-9)
    for logit_N, score_N in zip(mine.logits(torch.from_numpy(x_ND)).numpy().T, theirs.T, strict=True):
        slope, offset = np.polyfit(score_N, logit_N, 1)  # each label's logits are its scores by one line that rises
        assert slope > 0
        np.testing.assert_allclose(logit_N, slope * score_N + offset, atol=1e-8)


def test_logistic_of_labels_is_one_vs_rest_of_scikit_learn() -> None:
    x_ND, label_NK = _features()
    mine = solve("logistic", torch.from_numpy(x_ND), label_NK, 4)
    assert mine.strength is not None
    one = LogisticRegression(C=1 / mine.strength, tol=1e-10, max_iter=10_000)
    theirs = OneVsRestClassifier(one).fit(StandardScaler().fit_transform(x_ND), label_NK)
    expected = theirs.predict_proba(StandardScaler().fit_transform(x_ND))
    np.testing.assert_allclose(mine.logits(torch.from_numpy(x_ND)).sigmoid().numpy(), expected, atol=2e-4)
    assert mine.strength in [pytest.approx(len(x_ND) * strength) for strength in STRENGTHS]


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_probabilities_of_unseen_images_hold(kind: Kind) -> None:
    x_ND, label_NK = _features(1200)
    head = solve(kind, torch.from_numpy(x_ND[:400]), label_NK[:400], 4)
    share_NK = head.logits(torch.from_numpy(x_ND[400:])).sigmoid().numpy()
    assert abs(share_NK.mean(0) - label_NK[400:].mean(0)).max() < 0.05
    target = torch.from_numpy(label_NK[400:]).double()
    constant = torch.from_numpy(label_NK[:400].mean(0)).double().expand_as(target)
    assert F.binary_cross_entropy(torch.from_numpy(share_NK), target) < 0.75 * F.binary_cross_entropy(constant, target)


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_labels_that_all_or_none_have_are_said_so_and_change_nothing(kind: Kind) -> None:
    x_ND, label_NK = _features(80)
    more_NK = np.column_stack([np.zeros(80), label_NK, np.ones(80)]).astype(np.uint8)
    plain, wider = (solve(kind, torch.from_numpy(x_ND), labels, labels.shape[1]) for labels in (label_NK, more_NK))
    torch.testing.assert_close(wider.weight_KD[1:5], plain.weight_KD)
    share_N6 = wider.logits(torch.from_numpy(x_ND)).sigmoid()
    assert (share_N6[:, 0] < 0.02).all()
    assert (share_N6[:, 5] > 0.98).all()
    nothing = solve(kind, torch.from_numpy(x_ND), np.ones((80, 2), np.uint8), 2)
    assert "nothing to learn" in nothing.notes[0]


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_labels_that_are_noise_stay_near_their_frequency(kind: Kind) -> None:
    random = np.random.default_rng(0)
    label_NK = (random.random((60, 3)) < (0.5, 0.3, 0.05)).astype(np.uint8)
    label_NK[0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = out_of_fold(kind, torch.from_numpy(random.normal(size=(60, 40))), label_NK, np.arange(60) % 5, 3)
    loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(label_NK).double(), reduction="none").mean(0)
    share_K = torch.from_numpy(label_NK.mean(0))
    assert (loss < F.binary_cross_entropy(share_K, share_K, reduction="none") + 0.15).all()


def test_a_line_is_the_least_log_loss_and_does_not_end_in_certainty() -> None:
    score_N1 = torch.linspace(-3, 3, 40, dtype=torch.float64)[:, None]
    right_N1 = (score_N1 > 0.5).double()
    slope, offset = fit_lines(score_N1, right_N1, torch.ones(40, dtype=torch.float64))
    assert 1 < float(slope) < 20  # apart without a mistake, and yet not certain
    assert float(-offset / slope) == pytest.approx(0.5, abs=0.25)
    wrong, base = fit_lines(-score_N1, right_N1, torch.ones(40, dtype=torch.float64))
    assert 0 < float(wrong) < 0.1
    assert torch.sigmoid(base) == pytest.approx(float(right_N1.mean()), abs=0.05)
