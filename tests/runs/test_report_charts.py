"""What the report's charts and intervals are computed with."""

from __future__ import annotations

import math
import re
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tltrain.runs.report.charts import Line, axis, line_chart, log_axis, thinned
from tltrain.runs.report.stats import mcnemar, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 7), (5, 10), (81, 90), (360, 360)])
def test_the_wilson_interval_solves_its_own_equation(right: int, n: int) -> None:
    share = right / n
    for bound in wilson(share, n):
        assert abs(share - bound) == pytest.approx(NormalDist().inv_cdf(0.975) * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1), (3, 3, 1), (1, 5, 2 * (1 + 6) / 2**6), (5, 0, 2 / 2**5), (2, 10, 2 * (1 + 12 + 66) / 2**12)],
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int, p: float) -> None:
    number = np.arange(only_a + only_b + 3)
    counted = mcnemar(number < only_a + 3, (number < 3) | (number >= only_a + 3))
    assert counted[:2] == (only_a, only_b)
    assert counted[2] == pytest.approx(p)


@given(st.floats(-1e6, 1e6), st.sampled_from([0.0, 1e-30]) | st.floats(1e-6, 1e6))
def test_an_axis_holds_its_range_with_few_even_ticks(low: float, size: float) -> None:
    drawn = axis(low, low + size)
    slack = 1e-6 * (size + abs(low)) + 1e-12
    assert drawn.low <= low + slack
    assert drawn.high >= low + size - slack
    assert 2 <= len(drawn.ticks) <= 8
    assert drawn(drawn.ticks[0]) == 0
    assert drawn(drawn.ticks[-1]) == pytest.approx(1000, abs=0.2)


def test_a_logarithmic_axis_spans_whole_decades() -> None:
    drawn = log_axis(3e-5, 0.02)
    assert drawn.ticks == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert drawn(1e-3) == 500


def test_a_curve_has_a_gap_where_a_value_is_not_finite() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 2.0), (4.0, math.inf)]
    markup = line_chart("t", [Line("a", points, "s0")], axis(0, 2), str, x_label="x", x_top=4)
    path = re.findall(r'd="([^"]*)" class="s0 line"', markup)
    assert path == ["M0.0 500.0h0L250.0 0.0h0M750.0 0.0h0"]


def test_thinning_keeps_the_mean_and_the_gap() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    few = thinned(points, 100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thinned(points[:100], 100) == points[:100]
    points[500] = (500.0, math.nan)
    assert [math.isnan(y) for _, y in thinned(points, 100)].index(True) == 50
