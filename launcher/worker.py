"""Entry point of each process that `accelerate launch` starts: `tltrain` with two differences.

A run that was stopped and saved exits with 0, because a launcher kills the other processes on any other code. outcome.json tells a
stopped run from a finished one. A process that fails writes a note, so that the first to fail can be named.
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
        signal.signal(number, signal.SIG_DFL)  # `accelerate launch` ignores them, and its children inherit that
    from tltrain.cli import main as cli
    from tltrain.cli.codes import EXIT_STOPPED

    try:
        code = cli.main(sys.argv[1:])
    except BaseException as error:
        _note(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    if code not in (0, EXIT_STOPPED):
        _note(f"tltrain ended with code {code}; its message stands in the log", "")
    return 0 if code == EXIT_STOPPED else code


def _note(error: str, trace: str) -> None:
    """Write a failure note, rank-N.failed.json, beside the logs of this job."""
    folder, rank = os.environ.get("TLTRAIN_NOTES"), int(os.environ.get("RANK", "0"))
    if folder is None:
        return
    note = {"rank": rank, "host": socket.gethostname(), "time": time.time(), "error": error, "traceback": trace}
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself, which is logged next
        Path(folder, f"rank-{rank}.failed.json").write_text(json.dumps(note, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
