"""Calls of a benchmark, several at a time: what --jobs means."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor


def add_to(parser: argparse.ArgumentParser, what: str) -> None:
    """The option --jobs. what: what runs several at a time."""
    parser.add_argument("--jobs", type=_number, default=1, metavar="N", help=f"{what} at a time; on a GPU they share it (default: 1)")


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of jobs; give 1 or more")
    return int(text)


def at_once(calls: Sequence[Callable[[], object]], num_jobs: int) -> None:
    """Make the calls in their order, `num_jobs` at a time. Raises what the first of them raises, and begins none behind it."""
    with ThreadPoolExecutor(num_jobs) as pool:
        ends = [pool.submit(call) for call in calls]
        try:
            for end in ends:
                end.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
