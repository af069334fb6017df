"""How long a head takes: what is estimated grows as the work does."""

from __future__ import annotations

import pytest

from tltrain.heads import cost
from tltrain.heads.cost import neighbours_s, solve_s

PRODUCT_S, LOOK_S = 1e-10, 1e-8


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_times", lambda num_classes: (PRODUCT_S, LOOK_S * num_classes))


def test_work_grows_with_rows_columns_and_classes() -> None:
    assert solve_s("ridge", 50_000, 2_048, 10) > 5 * solve_s("ridge", 5_000, 2_048, 10)
    assert solve_s("logistic", 2_000, 512, 100) == pytest.approx(10 * solve_s("logistic", 2_000, 512, 10), rel=0.1)
    assert solve_s("logistic", 2_000, 512, 10) > 5 * solve_s("ridge", 2_000, 512, 10) > 0
    assert solve_s("nearest_mean", 2_000, 512, 10) < solve_s("ridge", 2_000, 512, 10)
    assert neighbours_s(2_000, 512) == pytest.approx(4 * neighbours_s(1_000, 512))


def test_few_rows_of_many_columns_are_worked_on_as_a_square_of_rows() -> None:
    assert solve_s("ridge", 100, 4_000, 10) < solve_s("ridge", 4_000, 4_000, 10) / 1_000


def test_many_rows_choose_their_strength_on_one_fold() -> None:
    assert solve_s("logistic", 10_000, 512, 10) < 0.5 * solve_s("logistic", 9_999, 512, 10)
