"""`python -m tltrain` is the command `tltrain`."""

from __future__ import annotations

import sys

from tltrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
