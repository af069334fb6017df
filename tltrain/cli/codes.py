"""Exit codes of the command, as docs/resuming.md lists them."""

from __future__ import annotations

EXIT_FAILED, EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130
"""75: stopped and saved, the same command goes on (EX_TEMPFAIL). 130: a second Ctrl-C (128 + SIGINT)."""


def exit_code(outcome: str) -> int:
    """The exit code of a run that ended as outcome.json says."""
    return {"finished": 0, "stopped": EXIT_STOPPED}.get(outcome, EXIT_FAILED)
