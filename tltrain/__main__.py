"""`python -m tltrain` is the command `tltrain`."""

from __future__ import annotations

import sys

from tltrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
