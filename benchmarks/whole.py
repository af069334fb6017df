"""Whole recipes and the demo, start to report: with the store as it decides for itself, and without."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import timing
from benchmarks.contestants import Use, ours
from benchmarks.timing import Case, Contestant, Lap, Result
from tltrain.commands import demo
from tltrain.core import recipe as recipes
from tltrain.core.recipe import Recipe

NAMES = ("digits-resnet", "digits-vit", "demo")


def main(words: Sequence[str] | None = None) -> list[Result]:
    parser = timing.parser("whole", __doc__)
    parser.add_argument("--only", choices=NAMES, help="one of them, not all")
    return timing.command(parser, _cases, words)


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    for name in [given.only] if given.only else NAMES:
        with tempfile.TemporaryDirectory(prefix="tltrain-whole-") as warm:
            yield case(name, given.smoke, Path(warm))


def case(name: str, smoke: bool, warm: Path) -> Case:
    """warm: where the store lies that a second start finds full."""

    def lap(use: Use, cache: Path | None) -> Lap:
        with tempfile.TemporaryDirectory(prefix="tltrain-whole-") as temporary:
            out, seconds, losses = Path(temporary), 0.0, []
            for recipe in _recipes(name, out, smoke):
                done = ours(recipe, use, cache or out / "cache", out / recipe.name, images=use)
                seconds += done.whole_s
                losses += [row["loss"] for row in done.rows]
            return Lap(seconds, tuple(losses))

    contestants = [
        Contestant("without the store", lambda: lap("never", None)),
        Contestant("with it, cold", lambda: lap("auto", None)),
        Contestant("with it, warm", lambda: lap("auto", warm)),
    ]
    title = f"Whole demo, {len(_recipes(name, warm, smoke))} runs" if name == "demo" else f"Whole recipe {name}"
    return Case(title=title, contestants=contestants, measure="time", tolerance=0)


def _recipes(name: str, out: Path, smoke: bool) -> list[Recipe]:
    """Those of a name, in order. In miniature the demo is a teacher and its student."""
    found = [recipes.load(name)] if name != "demo" else []
    if name == "demo":
        arms = [arm.recipe for arm in demo.arms(demo.demo_data(0), 0, out)]
        found = [r for r in arms if r.name in ("resnet-stages", "student-distilled")] if smoke else arms
    return [recipe.smoke() for recipe in found] if smoke else found


if __name__ == "__main__":
    main()
