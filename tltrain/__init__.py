"""tltrain fine-tunes image backbones in stages and distils one into another; see the README."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"


def share() -> Path:
    """The folder that holds accelerate_configs/ and slurm/: inside the package in a wheel, the checkout in an editable install."""
    package = Path(__file__).resolve().parent
    shared = package / "_share"
    return shared if shared.is_dir() else package.parent
