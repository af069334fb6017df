"""Flags of predict and evaluate for uncertainty (sets, abstention, strangers) and for several views of an image."""

from __future__ import annotations

from argparse import ArgumentParser


def doubt_arguments(parser: ArgumentParser) -> None:
    """Add --coverage, --abstain, --strangers and --views, as `evaluation.promises.fitted.Wanted` takes them."""
    more = parser.add_argument_group("what it does not know (fitted on val)")
    more.add_argument("--coverage", type=float, metavar="SHARE", help="sets of classes that hold the true one so often, such as 0.9")
    more.add_argument("--abstain", type=float, metavar="SHARE", help="answer only where so many answers are right, such as 0.95")
    more.add_argument("--strangers", action="store_true", help="mark images that are like none of the training's: none of the classes")
    more.add_argument("--views", type=int, default=1, metavar="N", help="the mean over N views of each image (default: 1)")
