"""The command `tltrain`: its verbs, and what becomes of their errors."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from tltrain import __version__
from tltrain.cli import operate, start, take, understand
from tltrain.cli.codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER
from tltrain.core.errors import MachineError, UserError
from tltrain.core.output import streams, wrapping
from tltrain.core.output.help import print_help
from tltrain.distributed.signals import last_resort

ALIASES = {"distill": "distil"}
"""Other spellings of verbs."""
RENAMED = {"store": "cache"}
"""Verbs by the names they had in 0.1, which 0.2 still understands."""

Verb = Callable[[Sequence[str]], int]
"""Runs with the words behind it on the command line, and returns the exit code. The first line of its docstring stands in the help."""

GROUPS: dict[str, dict[str, Verb]] = {
    "start a run": {
        "fit": start.fit, "probe": start.probe, "train": start.train, "folds": start.folds, "sweep": start.sweep, "lr": start.lr,
        "plan": start.plan, "preview": start.preview, "distil": start.distil, "launch": start.launch, "demo": start.demo,
    },
    "understand it": {"ls": understand.ls, "report": understand.report, "evaluate": understand.evaluate, "compare": understand.compare},
    "take it away": {"predict": take.predict, "export": take.export, "soup": take.soup},
    "operate": {"doctor": operate.doctor, "cache": operate.cache, "recipes": operate.recipes, "schema": operate.schema},
}  # fmt: skip
"""The verbs, by what a person wants."""
VERBS = {name: verb for group in GROUPS.values() for name, verb in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 1 failed, 2 the user's mistake, 75 stopped and saved."""
    if argv is None:
        with last_resort():
            code = main(sys.argv[1:])
        if code == EXIT_INTERRUPTED:
            sys.stderr.flush()
            os._exit(code)  # Python would wait for threads, which a disk that does not answer may hold
        if "triton" not in sys.modules:  # Triton 3.9 prints a page of "leaked" for each of its objects that is not collected
            gc.freeze()  # Python's last collection would look through all objects of torch, for 1.4 s, and then end the process
        return code
    streams.open_missing()
    streams.say_all()
    wrapping.say_warnings()
    try:
        code = _run(list(argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        return streams.complain(str(error), EXIT_FAILED if isinstance(error, MachineError) else EXIT_USER)
    except KeyboardInterrupt:
        return streams.complain("interrupted; nothing was lost that a checkpoint holds", EXIT_INTERRUPTED)
    except OSError as error:
        if isinstance(error, PermissionError) and error.filename is not None:  # a folder on the way to a path that the user gave
            return streams.complain(f"{error.filename}: permission denied; ask its owner, or name another", EXIT_USER)
        return streams.lost(error, EXIT_FAILED)


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print_help({group: {name: str(verb.__doc__) for name, verb in verbs.items()} for group, verbs in GROUPS.items()})
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] in RENAMED:
        from tltrain.core.flags import say_renamed

        say_renamed(f"tltrain {argv[0]}", f"tltrain {RENAMED[argv[0]]}")
    verb = VERBS.get((RENAMED | ALIASES).get(argv[0], argv[0]))
    if verb is None:
        near = get_close_matches(argv[0], VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(VERBS)}"
        raise UserError(f"tltrain has no verb {argv[0]!r}; {hint}")
    return verb(argv[1:])
