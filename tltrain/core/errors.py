"""The one exception a user sees: it says the value, the rule and the remedy, and ends the command with exit code 2."""


class UserError(ValueError):
    """Something the user can put right. The command prints the message alone, without a stack trace, and exits with 2."""
