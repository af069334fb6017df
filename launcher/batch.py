"""The old name of `launcher.slurm.batch`. Job scripts in old run folders still call it."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("launcher.slurm.batch", run_name="__main__", alter_sys=True)
