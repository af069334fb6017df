"""Answers that are withheld: the threshold by hand, the bound by scipy and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tltrain.core.errors import UserError
from tltrain.uncertainty.abstain import MOST_POINTS, SHARES, curve, figures, fit_abstention, least_images, reachable
from tltrain.uncertainty.answers import Answers


def made(confidence: np.ndarray, right: np.ndarray) -> Answers:
    return Answers(confidence, confidence, right)


TWENTY = made(np.arange(1, 21) / 20 - 0.025, np.array([0] * 4 + [1, 0] * 3 + [1] * 10) > 0)
"""The surest ten are right, of the next six every second, of the rest none."""


def test_the_threshold_answers_the_most_that_reaches_the_target() -> None:
    rule = fit_abstention(TWENTY, 0.9)
    assert (rule.answered, rule.right, rule.num_val) == (12, 11, 20)  # 11 of 12; 12 of 14 are too few
    assert rule.threshold == TWENTY.confidence[7]
    assert (TWENTY.confidence > rule.threshold).sum() == 12
    everything = fit_abstention(TWENTY, 0.6)
    assert (everything.threshold, everything.answered, everything.right) == (0.0, 20, 13)
    out = figures(rule, made(np.array([0.2, 0.37, 0.5, 0.9]), np.array([True, True, False, True])))
    assert (out["answered"], out["right"], out["n"], out["val"]) == (2, 1, 4, {"n": 20, "answered": 12, "right": 11})


def test_the_bound_is_clopper_and_pearsons_for_all_thresholds_together() -> None:
    rule = fit_abstention(TWENTY, 0.9)
    exact = stats.binomtest(11, 12).proportion_ci(1 - 2 * 0.05 / SHARES, "exact")
    assert rule.least == pytest.approx(exact.low, rel=1e-9)


def test_the_bound_holds_for_thresholds_that_were_chosen_by_looking() -> None:
    rng, broken, kept = np.random.default_rng(0), 0, 0
    for _ in range(400):
        confidence = rng.random(60)
        try:
            rule = fit_abstention(made(confidence, rng.random(60) < 0.3 * confidence + 0.6), 0.8)
        except UserError:
            continue  # nothing is promised
        kept += 1
        broken += 0.3 * (rule.threshold + 1) / 2 + 0.6 < rule.least  # the accuracy of all images above the threshold
    assert kept > 300
    assert broken <= 0.05 * kept


@pytest.mark.parametrize(("target", "num"), [(0.6, 12), (0.9, 57), (0.95, 117), (0.99, 597)])
def test_the_least_val_that_can_promise_is_one_that_is_all_right(target: float, num: int) -> None:
    assert least_images(target) == num
    for n, reaches in ((num, True), (num - 1, False)):
        confidence = np.linspace(0.5, 1, n)
        rule = fit_abstention(made(confidence, np.ones(n, bool)), target)
        assert rule.answered == n
        assert (rule.least >= target) == reaches
        assert rule.is_promised == (n >= min(num, 57)), "val for 90 % promises something, if less than was asked for"
    assert reachable(made(np.linspace(0.5, 1, 56), np.ones(56, bool))) == []
    assert [rule.target for rule in reachable(made(np.linspace(0.5, 1, 57), np.ones(57, bool)))] == [0.9, 0.95, 0.99]
    assert reachable(Answers(np.ones(600), np.ones(600), np.ones(600, bool), num_groups=56)) == [], "a group counts once"


def test_a_target_that_val_never_reaches_is_refused() -> None:
    half = made(np.linspace(0.5, 0.9, 40), np.arange(40) % 2 == 0)
    with pytest.raises(UserError, match=r"the surest reach 5\d\.\d %|the surest reach 50\.0 %"):
        fit_abstention(half, 0.9)


def test_equally_sure_images_are_answered_together() -> None:
    same = made(np.array([1.0, 1.0, 1.0, 0.5]), np.array([True, False, True, True]))
    assert np.array(curve(same)) == pytest.approx(np.array([(0.75, 2 / 3), (1.0, 0.75)]))
    assert fit_abstention(same, 0.6).answered == 4
    with pytest.raises(UserError, match="75"):
        fit_abstention(same, 0.9)


def test_the_curve_of_many_images_is_thinned_and_ends_with_all() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.random(5000)
    right = rng.random(5000) < confidence
    points = curve(made(confidence, right))
    assert len(points) <= MOST_POINTS
    assert points[-1][0] == 1.0
    assert points[-1][1] == pytest.approx(right.mean())
    share, accuracy = points[70]
    assert accuracy == pytest.approx(right[np.argsort(-confidence)][: round(share * 5000)].mean())
