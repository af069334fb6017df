"""The timing commands: that they are fair, that they refuse to compare what is not equal, and that each of them runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import timing
from benchmarks.timing import Aim, Case, Contestant, Lap, Unequal, check_losses, ratio_of_medians, run_case, show, summarise, turns, verdict


def made_case(runs: Sequence[Callable[[], Lap]], **changes: Any) -> Case:
    contestants = [Contestant(name, run) for name, run in zip("abc", runs, strict=False)]
    given = {"title": "a race", "contestants": contestants, "measure": "time", "tolerance": 1e-3, **changes}
    return Case(**given)


def lap(seconds: float = 1.0, *losses: float) -> Callable[[], Lap]:
    return lambda: Lap(seconds, losses or (0.5,))


def test_a_steady_drift_of_the_machine_costs_all_alike() -> None:
    assert turns(2) == [0, 1, 1, 0]
    assert turns(3) == [0, 1, 2, 2, 1, 0]
    ran = []

    def slower_and_slower(name: str) -> Callable[[], Lap]:
        def run() -> Lap:
            ran.append(name)
            return Lap(1.0 + 0.125 * len(ran), (0.5,))

        return run

    result = run_case(made_case([slower_and_slower(name) for name in "abc"]), 3, lambda text: None)
    assert "".join(ran) == "abc" + 3 * "abccba"
    assert result.rows[0].rounds == result.rows[1].rounds == result.rows[2].rounds == [1.8125, 2.5625, 3.3125]
    assert result.rows[2].ratio == (1.0, 1.0, 1.0)


def test_the_interval_is_of_paired_rounds() -> None:
    base = [1.0, 1.0, 5.0, 1.0, 9.0, 1.0, 1.0]  # two rounds in which the machine did something else
    assert ratio_of_medians([2 * seconds for seconds in base], base) == (2.0, 2.0, 2.0)
    noisy = [1.0, 1.2, 0.9, 1.1, 1.05, 0.95, 1.0]
    value, low, high = ratio_of_medians(noisy, [1.0] * 7)
    assert value == 1.0
    assert 0.9 <= low < value < high <= 1.2
    assert ratio_of_medians(noisy, [1.0] * 7) == (value, low, high), "the same figures give the same interval"
    wide = ratio_of_medians([1.0, 3.0, 0.5, 2.0, 1.5, 0.7, 1.0], [1.0] * 7)
    assert wide[2] - wide[1] > high - low


@pytest.mark.parametrize("other", [0.5006, math.nan, math.inf])
def test_no_time_is_told_of_those_that_learn_something_else(other: float) -> None:
    case = made_case([lap(1.0, 0.5), lap(0.1, other)])
    with pytest.raises(Unequal, match=r"b shows a loss of .* where a has 0\.5, more than 0\.001 apart"):
        run_case(case, 1, lambda text: None)
    run_case(made_case([lap(1.0, 0.5), lap(0.1, 0.5004)]), 1, lambda text: None)


def test_what_changes_in_a_later_lap_is_seen() -> None:
    losses = iter([0.5, 0.5, 0.5, 0.6, 0.5])
    case = made_case([lap(), lambda: Lap(1.0, (next(losses),))])
    with pytest.raises(Unequal, match=r"0\.6"):
        run_case(case, 2, lambda text: None)


def test_losses_are_compared_among_those_that_should_learn_the_same() -> None:
    case = made_case([lap(), lap(), lap()], tolerance=0)
    alone, *taught = case.contestants
    case = made_case([], contestants=[alone, *(Contestant(c.name, c.run, learns="from a teacher") for c in taught)], tolerance=0)
    check_losses(case, [[(0.5,)], [(0.3, 0.2)], [(0.3, 0.2)]])
    with pytest.raises(Unequal, match=r"c shows a loss of 0\.2\d* where b has 0\.2, more than 0 apart"):
        check_losses(case, [[(0.5,)], [(0.3, 0.2)], [(0.3, math.nextafter(0.2, 1))]])
    with pytest.raises(Unequal, match="c shows a loss of 1 where b has 2"):
        check_losses(case, [[(0.5,)], [(0.3, 0.2)], [(0.3,)]])


def test_the_table_and_what_is_said_below_it() -> None:
    laps = [[3.0, 3.0] * 7, [0.2, 0.1] * 7]
    case = made_case([lap(), lap()], measure="speed", bound="20 times", aim=Aim("b", "speed", 15))
    result = summarise(case, laps, [0.25, 0.25])
    assert show(result).splitlines() == [
        "| a race | n | median, s | least to most | speed against a (95 % interval) | last loss |",
        "|--|--:|--:|--:|--:|--:|",
        "| a | 7 | 3 | 3 to 3 | 1 | 0.25000 |",
        "| b | 7 | 0.15 | 0.15 to 0.15 | 20.00 (20.00 to 20.00) | 0.25000 |",
        "",
        "bound  20 times",
        "aim    b, at least 15 times its speed: 20.00 (20.00 to 20.00), reached",
    ]
    per_step = summarise(made_case([lap(), lap()], num_steps=100, aim=Aim("b", "time", 0.04)), laps, [0.25, 0.25])
    assert "| b | 7 | 1.5 | 1.5 to 1.5 | 0.05 (0.05 to 0.05) | 0.25000 |" in show(per_step)
    assert verdict(per_step).endswith("0.05 (0.05 to 0.05), not reached")
    other_way = summarise(made_case([lap(), lap()], aim=Aim("b", "speed", 15)), laps, [0.25, 0.25])
    assert verdict(other_way) == "b, at least 15 times its speed: 20.00 (20.00 to 20.00), reached"


def test_the_json_holds_every_lap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    case = made_case([lap(2.0), lap(1.0)], aim=Aim("b", "time", 0.6))
    timing.command(timing.parser("race", "A race."), lambda given: [case], ["--rounds", "8", "--json", str(file)])
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["command"] == f"python -m benchmarks.race --rounds 8 --json {file}"
    assert kept["hardware"]["threads"] == 1
    assert set(kept["versions"]) >= {"python", "torch", "tltrain"}
    row = kept["cases"][0]["rows"][1]
    assert (kept["cases"][0]["n"], row["laps"], row["rounds"], row["median"]) == (8, [1.0] * 16, [1.0] * 8, 1.0)
    assert row["ratio"] == [0.5, 0.5, 0.5]
    assert "b, at most 0.6 times its time: 0.50 (0.50 to 0.50), reached" in capsys.readouterr().out


def test_too_few_rounds_and_unequal_losses_end_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        timing.command(timing.parser("race", "A race."), lambda given: [], ["--rounds", "6"])
    assert "--rounds is 6; fewer than 7 say little" in capsys.readouterr().err
    unequal = made_case([lap(1.0, 0.5), lap(1.0, 0.6)])
    with pytest.raises(SystemExit, match="so no time is told"):
        timing.command(timing.parser("race", "A race."), lambda given: [unequal], ["--smoke"])
    assert "median" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["head_stage", "suffix", "teacher", "hot_loop", "whole"])
def test_each_command_in_miniature(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That it runs, and that its contestants learn the same."""
    from importlib import import_module

    file = tmp_path / "figures.json"
    words = ["--smoke", "--json", str(file), *(["--only", "demo"] if name == "whole" else [])]
    results = import_module(f"benchmarks.{name}").main(words)
    assert results
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert len(kept["cases"]) == len(results)
    for case in kept["cases"]:
        assert len(case["rows"]) >= 2
        assert all(len(row["laps"]) == 2 and min(row["laps"]) > 0 for row in case["rows"])
    said = capsys.readouterr().out
    assert "these times say nothing" in said
    assert "reached" not in said


@pytest.mark.slow
def test_where_views_are_made_is_timed_in_miniature(tmp_path: Path) -> None:
    from benchmarks import views

    rows = views.main(["--dry-run", "--json", str(tmp_path / "figures.json")])
    assert [(row.where, row.workers) for row in rows] == [("the workers", 1), ("the device", 1), ("the device alone", None)]
    assert all(row.images_per_s > 0 for row in rows)
    assert len(json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["rows"]) == 3


def test_the_timing_commands_are_listed() -> None:
    from benchmarks.__main__ import commands

    assert {"head_stage", "suffix", "teacher", "hot_loop", "whole"} <= set(commands())
    assert "timing" not in commands(), "what the commands share is none of them"
