"""`python -m launcher` is the command `tltrain launch`."""

from __future__ import annotations

import sys

from launcher.cli import main
from tltrain.core.errors import UserError
from tltrain.core.output.streams import complain

if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code = complain(f"launch: {error}", 2)
    sys.exit(code)
