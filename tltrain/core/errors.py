"""UserError: a mistake that the user can correct. Its message gives the value, the rule and the remedy."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake that the user can correct. The command prints only the message, without a stack trace, and exits with code 2."""


LISTED = 20
"""Number of files or classes that one message names. The rest is only counted."""


def some(names: Sequence[str]) -> str:
    """The names as one string: at most LISTED of them, then the number of the others."""
    rest = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest
