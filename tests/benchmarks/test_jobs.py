"""Calls several at a time: how many, in which order, and what one that fails stops."""

from __future__ import annotations

import argparse
import threading
from functools import partial

import pytest

from benchmarks import jobs


def test_so_many_calls_run_at_a_time() -> None:
    together = threading.Barrier(3)
    jobs.at_once([partial(together.wait, 60)] * 6, 3)  # with fewer it would never be left
    order: list[int] = []
    jobs.at_once([partial(order.append, i) for i in range(5)], 1)
    assert order == [0, 1, 2, 3, 4]


def test_a_call_that_fails_is_raised_and_none_begins_behind_it() -> None:
    made: list[int] = []
    failed = threading.Event()

    def fail() -> None:
        raise SystemExit("no room")

    def wait(i: int) -> None:
        made.append(i)
        failed.wait(60)

    def end() -> None:
        with pytest.raises(SystemExit, match="no room"):
            jobs.at_once([fail, *(partial(wait, i) for i in range(9))], 1)

    told = threading.Timer(1.0, failed.set)
    told.start()
    end()
    told.join()
    assert len(made) <= 1, "one may have begun before the failure was heard of"


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_what_is_no_number_of_jobs_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    jobs.add_to(parser, "runs")
    assert parser.parse_args(["--jobs", "3"]).jobs == 3
    assert parser.parse_args([]).jobs == 1
    with pytest.raises(SystemExit):
        parser.parse_args([f"--jobs={text}"])
    assert f"'{text}' is no number of jobs; give 1 or more" in capsys.readouterr().err
