"""Strangers: distances, limit, AUROC and FPR95 are scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors

from tltrain.uncertainty.strangers import BLOCK, Strangers, detection_figures, fit_strangers


def drawn(num: int, seed: int, off: float = 0.0) -> np.ndarray:
    """Features around three directions, as a network's after a ReLU."""
    rng = np.random.default_rng(seed)
    centres = np.abs(np.random.default_rng(7).normal(size=(3, 12))) * 3
    return np.maximum(centres[rng.integers(0, 3, num)] + off + rng.normal(size=(num, 12)), 0).astype(np.float32)


def test_the_distance_and_the_limit_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val, other = drawn(200, 0), drawn(59, 1), drawn(40, 2, off=2.0)
    search = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(train.astype(np.float64))
    of_val, of_other = (search.kneighbors(rows.astype(np.float64))[0][:, 0] for rows in (val, other))
    limit = np.sort(of_val)[56]  # of 59 the 57th: ceil(60 * 0.95)
    strangers = fit_strangers(train, val)
    assert strangers.limit == pytest.approx(limit, abs=1e-6)
    assert strangers.score(other) == pytest.approx(of_other / limit, rel=1e-3)
    assert (strangers.score(val) <= 1).sum() == 57
    monkeypatch.setattr("tltrain.uncertainty.strangers.BLOCK", 1)
    assert strangers.score(other) == pytest.approx(of_other / limit, rel=1e-3), "one image at a time"
    assert len(train) < BLOCK


def test_scale_does_not_matter_and_what_was_kept_says_the_same() -> None:
    strangers = fit_strangers(drawn(100, 0), drawn(30, 1))
    rows = drawn(20, 2)
    again = Strangers.of_arrays(strangers.arrays())
    assert (again.score(rows) == strangers.score(rows)).all()
    assert strangers.score(rows * 50) == pytest.approx(strangers.score(rows), rel=1e-3)
    assert strangers.score(np.zeros((1, 12), np.float32))[0] == pytest.approx(1 / strangers.limit)


def test_what_is_found_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    known, strange = rng.random(80).round(2), rng.random(50).round(2) + 0.3  # rounded: some are equal
    out = detection_figures(known, strange)
    is_strange, score = np.r_[np.zeros(80), np.ones(50)], np.r_[known, strange]
    assert out["auroc"] == pytest.approx(roc_auc_score(is_strange, score))
    assert out["known"] == {"n": 80, "marked": (known > 1).sum()}
    assert out["strange"] == {"n": 50, "marked": (strange > 1).sum()}
    wrongly_kept, kept, _ = roc_curve(1 - is_strange, -score, drop_intermediate=False)
    assert out["strangers_missed_at_95"] == pytest.approx(wrongly_kept[np.argmax(kept >= 0.95)], abs=0.021)
    assert detection_figures(known, None) == {"known": out["known"], "strange": None, "auroc": None, "strangers_missed_at_95": None}
