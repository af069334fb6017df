"""The old name of `launcher.slurm.node`, which the job scripts in old run folders call."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("launcher.slurm.node", run_name="__main__", alter_sys=True)
