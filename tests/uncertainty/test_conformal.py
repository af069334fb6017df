"""Sets of classes: the rank by hand, the promise by simulation, and what a small val cannot promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from tltrain.core.errors import UserError
from tltrain.uncertainty.answers import Answers, share
from tltrain.uncertainty.conformal import figures, fit_sets, least_images, reachable


def answers_of(p_NK: np.ndarray, label_N: np.ndarray) -> Answers:
    return Answers(p_NK.max(1), p_NK[np.arange(len(label_N)), label_N], p_NK.argmax(1) == label_N)


def of_own(own: list[float]) -> Answers:
    return Answers(np.array(own), np.array(own), np.ones(len(own), bool))


def test_the_threshold_by_hand() -> None:
    own = [0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95]
    assert fit_sets(of_own(own), 0.9).threshold == 0.05  # of nine images the ninth: ceil(10 * 0.9)
    assert fit_sets(of_own(own), 0.8).threshold == 0.2
    assert fit_sets(of_own(own[::-1]), 0.5).threshold == 0.5
    assert fit_sets(of_own(own), 0.85).threshold == 0.05  # ceil(10 * 0.85) is 9, and ceil(9 * 0.85) would be 8
    sets = fit_sets(of_own(own), 0.8)
    members = sets.members(np.array([[0.2, 0.7, 0.1], [0.19, 0.19, 0.62], [0.15, 0.1, 0.19]]))
    assert members.tolist() == [[True, True, False], [False, False, True], [False, False, True]]  # the last: the most probable at least


def test_what_val_is_too_small_for_is_not_promised() -> None:
    assert [least_images(c) for c in (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)] == [1, 4, 9, 19, 99, 999]
    for coverage in (0.5, 0.8, 0.9, 0.95, 0.99):
        n = least_images(coverage)
        assert fit_sets(of_own([0.5] * n), coverage).num_val == n
        with pytest.raises(UserError, match=f"at least {n}"):
            fit_sets(of_own([0.5] * (n - 1)), coverage)
    assert [s.coverage for s in reachable(of_own([0.5] * 20))] == [0.9, 0.95]
    assert reachable(of_own([0.5] * 8)) == []
    with pytest.raises(UserError, match=r"did you mean 0\.9\?"):
        share("--coverage", 90)


@pytest.mark.parametrize(("num", "coverage"), [(9, 0.9), (30, 0.8), (199, 0.95)])
def test_the_promise_is_kept_over_draws_of_val_and_spread_as_said(num: int, coverage: float) -> None:
    """Of a network that is confidently wrong: the coverage over draws is ceil((n + 1) coverage) / (n + 1), and spreads as Beta does."""
    rng = np.random.default_rng(0)

    def own_of(n: int) -> np.ndarray:
        return softmax(rng.normal(size=(n, 3)) * 4, axis=1)[:, 0]

    every = np.sort(own_of(200_000))
    reached, between = [], fit_sets(of_own(own_of(num).tolist()), coverage).between
    for _ in range(2000):
        threshold = fit_sets(of_own(own_of(num).tolist()), coverage).threshold
        reached.append(1 - np.searchsorted(every, threshold) / len(every))
    exact = np.ceil(round((num + 1) * coverage, 9)) / (num + 1)
    assert np.mean(reached) == pytest.approx(exact, abs=0.01)
    assert np.quantile(reached, [0.025, 0.975]) == pytest.approx(between, abs=0.02)


def test_what_is_shown_is_counted_by_hand() -> None:
    p_NK = np.array([[0.8, 0.15, 0.05], [0.5, 0.3, 0.2], [0.25, 0.4, 0.35], [0.1, 0.1, 0.8]])
    label_N = np.array([0, 2, 2, 0])
    sets = fit_sets(of_own([0.3] * 9), 0.9)
    in_NK = sets.members(p_NK)
    out = figures(sets, answers_of(p_NK, label_N), in_NK.sum(1), label_N, ["a", "b", "c"])
    assert in_NK.sum(1).tolist() == [1, 2, 2, 1]
    assert (out["n"], out["covered"], out["mean_size"], out["sizes"]) == (4, 2, 1.5, {"1": 2, "2": 2})
    assert out["per_class"] == [
        {"name": "a", "n": 2, "covered": 1, "mean_size": 1.0},
        {"name": "c", "n": 2, "covered": 1, "mean_size": 2.0},
    ]
    assert out["covered"] == in_NK[np.arange(4), label_N].sum()
