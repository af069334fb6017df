"""What lies below a data folder: images, and what is passed over and counted."""

from __future__ import annotations

import errno
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tltrain.core.errors import UserError, some
from tltrain.core.paths import cache_root
from tltrain.data.decode import SUFFIXES
from tltrain.data.sources.names import check_utf8, shown

SYSTEM = {"__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
"""Folders that systems and network disks put beside the files, in lower case."""

Identity = tuple[int, int] | str


@dataclass(frozen=True)
class Below:
    """What stands right in a folder, each sorted by name."""

    folders: tuple[Path, ...]
    images: tuple[Path, ...]
    others: tuple[str, ...]
    """Suffixes of the files that are no images by their suffix, in lower case."""


class Tree:
    """A data folder. Each folder is listed once; what is passed over is remembered for the notes."""

    def __init__(self, root: Path) -> None:
        check_utf8(root)
        self.root = root
        self._looked: dict[Path, Below] = {}
        self._passed: dict[str, list[str]] = defaultdict(list)
        self._cache = identity_of(cache_root())

    def look(self, folder: Path) -> Below:
        """Raises UserError for a folder that cannot be listed, a name that is not UTF-8, and our own cache among the images."""
        if folder not in self._looked:
            self._looked[folder] = self._list(folder)
        return self._looked[folder]

    def images(self, folder: Path, others: Counter[str]) -> Iterator[Path]:
        """Images in and below a folder, in a fixed order, each folder once; files of other suffixes are added to `others`."""
        entered: set[Identity] = set()
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            identity = identity_of(here)
            if identity in entered:
                self._pass("links to a folder that was read already", here)
                continue
            entered.add(identity)
            below = self.look(here)
            others.update(below.others)
            yield from below.images
            waiting += reversed(below.folders)

    def notes(self) -> tuple[str, ...]:
        """What was passed over, by kind."""
        return tuple(f"passed over, {kind}: {some(sorted(set(paths)))}" for kind, paths in sorted(self._passed.items()))

    def _list(self, folder: Path) -> Below:
        folders, images, others = [], [], []
        above: set[Identity] | None = None
        for entry in _entries(folder):
            path, is_image = Path(entry.path), _suffix(entry.name) in SUFFIXES
            is_folder = _is_folder(entry)
            kind = _nobodys(path, is_folder, is_image)
            if kind:
                self._pass(kind, path)
            elif entry.name.startswith("."):
                pass  # notes of an editor or of the system
            elif is_folder:
                check_utf8(path)
                if entry.is_symlink():
                    above = above or all_above(folder)
                    if identity_of(path) in above:
                        self._pass("links to a folder above them", path)
                        continue
                self._refuse_cache(path)
                folders.append(path)
            elif is_image:
                check_utf8(path)
                images.append(path)
            else:
                others.append(shown(_suffix(entry.name)))
        return Below(tuple(sorted(folders)), tuple(sorted(images)), tuple(others))

    def _pass(self, kind: str, path: Path) -> None:
        self._passed[kind].append(shown(path.relative_to(self.root)))

    def _refuse_cache(self, path: Path) -> None:
        if identity_of(path) == self._cache:
            raise UserError(f"{path} is the cache of tltrain and lies among the images; set TLTRAIN_CACHE to a folder outside {self.root}")


def holds_runs(folder: Path) -> bool:
    """Whether a folder is one of runs: run folders stand in it, or folders of them (an array), and it has their name."""
    return folder.name == "runs" and any(is_run(path) for pattern in ("*", "*/*") for path in folder.glob(pattern))


def is_run(folder: Path) -> bool:
    """Whether a training run writes there."""
    return os.path.isfile(folder / "recipe.yaml") and os.path.isdir(folder / "generations")


def _nobodys(path: Path, is_folder: bool, is_image: bool) -> str | None:
    """Why a folder or an image is not somebody's image, or None."""
    if path.name.startswith("."):
        return "hidden" if is_folder or is_image else None
    if not is_folder:
        return None
    if path.name.casefold() in SYSTEM:
        return "folders of the system"
    if is_run(path) or holds_runs(path):
        return "run folders"
    return "caches" if os.path.isfile(path / "CACHEDIR.TAG") else None


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise unreadable(folder, error) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Links are followed; one that leads nowhere or in a circle is a file, of which the scan says why it cannot be read."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT):
            return False
        raise unreadable(Path(entry.path), error) from error


def unreadable(folder: Path, error: OSError) -> UserError:
    """What to say of a folder that is there and cannot be looked into."""
    return UserError(f"{shown(folder)} cannot be read: {error.strerror}; mend its permissions, or move it out of the data")


def identity_of(folder: Path) -> Identity:
    """One and the same for all paths to a folder."""
    try:
        found = folder.stat()
    except OSError as error:
        raise unreadable(folder, error) from error
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(folder)  # some network disks number nothing


def all_above(folder: Path) -> set[Identity]:
    """The folder and all above it, by its path and by where it really lies: a link to one of them goes in a circle."""
    real = Path(os.path.realpath(folder))
    return {identity_of(path) for path in {folder, *folder.parents, real, *real.parents}}


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
