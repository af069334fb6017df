"""The one exception a user sees: it says the value, the rule and the remedy, and ends the command with exit code 2."""

from collections.abc import Sequence


class UserError(ValueError):
    """Something the user can put right. The command prints the message alone, without a stack trace, and exits with 2."""


LISTED = 20
"""Files or classes that one note names; it counts the rest."""


def some(names: Sequence[str]) -> str:
    """The names, cut after a while."""
    rest = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest
