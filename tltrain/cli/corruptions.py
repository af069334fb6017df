"""The flags of `tltrain evaluate --corruptions`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tltrain.core.errors import UserError

GOES_ALONG = {"run", "data", "split", "json", "batch", "corruptions", "severities", "against"}
"""Arguments of `evaluate` that may be combined with --corruptions."""


def corruption_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to those of `tltrain evaluate`."""
    group = parser.add_argument_group("under corruptions")
    group.add_argument(
        "--corruptions", nargs="?", const="all", metavar="NAMES", help="measure under noise, blur, weather and digital damage; or under "
        "some, such as noise,jpeg. Writes RUN/corruptions",
    )  # fmt: skip
    group.add_argument("--severities", metavar="LIST", help="such as 1,3,5 (default: all of 1 to 5)")
    group.add_argument("--against", type=Path, metavar="RUN2", help="measure another run too, and compare image by image")


def under_corruptions(parser: argparse.ArgumentParser, arguments: argparse.Namespace, split: str) -> int | None:
    """Measure under corruptions and return the exit code. None if they are not asked for. Raises UserError."""
    if arguments.corruptions is None:
        for name in ("severities", "against"):
            if getattr(arguments, name) is not None:
                other = " (`tltrain compare` compares runs on clean images)" if name == "against" else ""
                raise UserError(f"--{name} belongs to --corruptions; give that too{other}")
        return None
    for name, value in vars(arguments).items():
        if name not in GOES_ALONG and value != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} does not go with --corruptions; ask for one after the other")
    from tltrain.evaluation.robustness.command import Ask, corruptions

    ask = Ask(
        arguments.run, arguments.corruptions, arguments.severities or "all", arguments.against, arguments.data, split, arguments.batch
    )
    return corruptions(ask, arguments.json)
