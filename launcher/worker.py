"""One process of a run, as `accelerate launch` starts it: `tltrain`, with two differences.

Launchers turn every exit code into 1 and kill the other processes for it, so a run that was stopped and saved leaves with 0: who wants
to know reads outcome.json. And a process that fails leaves a note, so that the first to fail can be named.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path


def main() -> int:
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # the launcher ignores them, and a child inherits that
    from tltrain.cli import main as cli

    try:
        code = cli.main(sys.argv[1:])
    except BaseException as error:
        _note(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    if code not in (0, cli.EXIT_STOPPED):
        _note(f"tltrain ended with code {code}; its message stands in the log", "")
    return 0 if code == cli.EXIT_STOPPED else code


def _note(error: str, trace: str) -> None:
    """Say who failed and how, beside the logs of this job."""
    folder, rank = os.environ.get("TLTRAIN_NOTES"), int(os.environ.get("RANK", "0"))
    if folder is None:
        return
    note = {"rank": rank, "host": socket.gethostname(), "time": time.time(), "error": error, "traceback": trace}
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself, which the log gets next
        Path(folder, f"rank-{rank}.failed.json").write_text(json.dumps(note, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
