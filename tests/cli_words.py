"""Commands of tltrain in this process."""

from __future__ import annotations

import pytest

from tltrain.cli.main import main


def mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a command that must end with exit code 2."""
    try:
        code = main(words)
    except SystemExit as end:  # argparse and tyro leave this way
        code = int(end.code or 0)
    captured = capsys.readouterr()
    assert code == 2, captured
    assert "Traceback" not in captured.err + captured.out
    return captured.err + captured.out
