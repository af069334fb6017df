"""Another user, for the tests of folders that are not one's own: a real one where the tests run as root, else rights taken away."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def readable_folder() -> Iterator[Path]:
    """A folder that every user of this machine may enter; pytest's own are for their owner alone, and so may TMPDIR be."""
    around = next((p for p in map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp")) if _everybody_may_enter(p)), None)
    if around is None:
        pytest.skip("no temporary folder here may be entered by every user")
    folder = Path(tempfile.mkdtemp(dir=around))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _everybody_may_enter(folder: Path) -> bool:
    return folder.is_dir() and all(f.stat().st_mode & 0o001 for f in (folder.resolve(), *folder.resolve().parents))


@contextmanager
def any_user() -> Iterator[None]:
    """Inside, permissions count: root may read everything, so it becomes another user."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@contextmanager
def another_user(*folders: Path) -> Iterator[None]:
    """Inside, this process may read what lies below the folders, and write nothing there."""
    if os.getuid() == 0:
        with any_user():
            yield
        return
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)
