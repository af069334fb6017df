"""What the report's charts and intervals are computed with."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tltrain.runs.report.charts import Line, Span, axis, line_chart, log_axis, thinned
from tltrain.runs.report.formatting import signed
from tltrain.runs.report.stats import mcnemar, wilson
from tltrain.runs.report.tables import deep, short


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


def test_classes_of_a_tree_go_by_the_last_parts_of_their_names_that_no_other_has() -> None:
    names = ["alive/cat", "made/things/cat", "made/hat", "town", "a/town", "x/y/z"]
    assert short(names, tree=True) == ["alive/cat", "things/cat", "hat", "town", "a/town", "z"]
    assert short(["a/b", "c/"], tree=True) == ["a/b", "c/"], "no paths in a tree"


def test_figures_on_colour_have_the_contrast_that_reading_takes() -> None:
    """At each depth of colour, by the rule of WCAG 2: at least 4.5 for small text, in light and in dark."""
    css = (files("tltrain.runs.report") / "page.css").read_text(encoding="utf-8")
    for theme in (css.partition("@media")[0], css.partition("@media")[2]):
        paper, on = (_rgb(theme, name) for name in ("paper", "on"))
        for kind in ("right", "wrong"):
            colour = _rgb(theme, kind)
            for percent in range(1, 101):
                mixed = [percent / 100 * a + (1 - percent / 100) * b for a, b in zip(colour, paper, strict=True)]
                text = [1.0, 1.0, 1.0] if "deep" in deep(kind, percent / 100) else on
                high, low = sorted((_luminance(mixed), _luminance(text)), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (kind, percent)


def _rgb(theme: str, name: str) -> list[float]:
    digits = re.search(rf"--{name}: #([0-9a-f]+);", theme)
    assert digits is not None
    text = digits[1] if len(digits[1]) == 6 else "".join(2 * digit for digit in digits[1])
    return [int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def _luminance(rgb: list[float]) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_difference_has_a_sign_and_nothing_has_none() -> None:
    assert [signed(value) for value in (0.011, -0.011, 0.0004, -0.0004)] == ["+1.1", "\u22121.1", "0.0", "0.0"]


def test_the_name_of_a_short_last_stage_has_room() -> None:
    """It ends at the right edge, and the name before it ends where that begins."""
    spans = [Span("first", 0, 95), Span("a long last one", 95, 100)]
    chart = line_chart("t", [Line("", [(0, 1), (100, 2)], "s0")], axis(0, 2), str, x_label="x", x_top=100, spans=spans)
    assert 'title="a long last one" style="right:0;max-width:16%"' in chart
    assert 'title="first" style="left:0.00%;width:84.00%"' in chart


def test_few_steps_have_a_tick_each() -> None:
    chart = line_chart("t", [Line("", [(0, 1), (5, 2)], "s0")], axis(0, 2), str, x_label="severity", x_top=5)
    assert re.findall(r'class="xt"[^>]*>([^<]*)<', chart) == ["0", "1", "2", "3", "4", "5"]
