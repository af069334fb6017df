"""A package of somebody else, installed: for the tests of what other packages add."""

from __future__ import annotations

from pathlib import Path


def install(site: Path, name: str, modules: dict[str, str], entry_points: str) -> Path:
    """Into a folder of installed packages, as pip leaves one. modules: name to source. Returns the folder."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return site
