"""Walks an image folder: finds images and class folders, and records what is skipped."""

from __future__ import annotations

import errno
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tltrain.core.errors import UserError, some
from tltrain.core.output import progress
from tltrain.core.paths import cache_root
from tltrain.data.decode import SUFFIXES
from tltrain.data.sources.names import check_all_utf8, check_utf8, shown

SYSTEM = {"__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
"""Folders created by operating systems and network disks, in lower case."""

Identity = tuple[int, int] | str


@dataclass(frozen=True)
class Below:
    """The direct contents of a folder, sorted by name."""

    folders: tuple[Path, ...]
    images: Sequence[Path]
    others: tuple[str, ...]
    """Suffixes of files without an image suffix, in lower case."""


class Children(Sequence[Path]):
    """Files of one folder: their paths are made when they are asked for, since a million of them take half a GB."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: Any) -> Any:
        return self.folder / self.names[place] if isinstance(place, int) else Children(self.folder, self.names[place])


class Tree:
    """An image folder. Each folder is listed once. Skipped entries are recorded for the notes."""

    def __init__(self, root: Path) -> None:
        check_utf8(root)
        self.root = root
        self._listings: dict[Path, Below] = {}
        self._skipped: dict[str, list[str]] = defaultdict(list)
        self._cache = identity_of(cache_root())

    def look(self, folder: Path) -> Below:
        """The direct contents of a folder. Raises UserError if it cannot be listed, has a non-UTF-8 name, or holds our own cache."""
        if folder not in self._listings:
            self._listings[folder] = self._list(folder)
        return self._listings[folder]

    def images(self, folder: Path, others: Counter[str]) -> Iterator[Path]:
        """All images under a folder, recursively and in a fixed order, each folder once. Counts other suffixes in `others`."""
        for place, names in self.by_folder(folder, others):
            yield from (place / name for name in names)

    def by_folder(self, folder: Path, others: Counter[str]) -> Iterator[tuple[Path, list[str]]]:
        """As `images`: the names of the images in one folder after another."""
        entered: set[Identity] = set()
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            identity = self.identity(current)
            if identity in entered:
                self._skip("links to a folder that was read already", current)
                continue
            entered.add(identity)
            below = self.look(current)
            others.update(below.others)
            images = below.images
            yield current, images.names if isinstance(images, Children) else [path.name for path in images]
            waiting += reversed(below.folders)

    def identity(self, folder: Path) -> Identity:
        """Equal for all paths to the same folder."""
        return identity_of(folder)

    def notes(self) -> tuple[str, ...]:
        """The skipped entries, one note for each kind."""
        return tuple(f"passed over, {kind}: {some(sorted(set(paths)))}" for kind, paths in sorted(self._skipped.items()))

    def _list(self, folder: Path) -> Below:
        folders, images, others = [], [], []
        above: set[Identity] | None = None
        for entry in _entries(folder):
            name = entry.name
            is_image = name[name.rfind(".") :].lower() in SUFFIXES and name.rfind(".") > 0
            is_folder = _is_folder(entry)
            if is_image and not is_folder and not name.startswith("."):
                images.append(name)
                continue
            path = Path(entry.path)
            kind = _why_skipped(path, is_folder, is_image)
            if kind:
                self._skip(kind, path)
            elif name.startswith("."):
                pass  # hidden files of an editor or the system
            elif is_folder:
                check_utf8(path)
                if entry.is_symlink():
                    above = above or all_above(folder)
                    if identity_of(path) in above:
                        self._skip("links to a folder above them", path)
                        continue
                self._refuse_cache(path)
                folders.append(path)
            else:
                others.append(shown(_suffix(name)))
        check_all_utf8(folder, images)
        progress.report(f"listing {shown(folder)}")
        return Below(tuple(sorted(folders)), Children(folder, sorted(images)), tuple(others))

    def _skip(self, kind: str, path: Path) -> None:
        self._skipped[kind].append(shown(path.relative_to(self.root)))

    def _refuse_cache(self, path: Path) -> None:
        if identity_of(path) == self._cache:
            raise UserError(f"{path} is the cache of tltrain and lies among the images; set TLTRAIN_CACHE to a folder outside {self.root}")


def holds_runs(folder: Path) -> bool:
    """Whether a folder is called runs and contains run folders, directly or in the folders of arrays."""
    return folder.name == "runs" and any(is_run(path) for pattern in ("*", "*/*") for path in folder.glob(pattern))


def is_run(folder: Path) -> bool:
    """Whether this is a run folder."""
    return os.path.isfile(folder / "recipe.yaml") and os.path.isdir(folder / "generations")


def _why_skipped(path: Path, is_folder: bool, is_image: bool) -> str | None:
    """The reason to skip a folder or an image, or None."""
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
    """Whether an entry is a folder. Follows links. A broken or circular link counts as a file, which the scan then reports."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT):
            return False
        raise unreadable(Path(entry.path), error) from error


def unreadable(folder: Path, error: OSError) -> UserError:
    """The error for a folder that exists but cannot be read."""
    return UserError(f"{shown(folder)} cannot be read: {error.strerror}; mend its permissions, or move it out of the data")


def identity_of(folder: Path) -> Identity:
    """An identity that is equal for all paths to the same folder."""
    try:
        status = folder.stat()
    except OSError as error:
        raise unreadable(folder, error) from error
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)  # some network disks have no inode numbers


def all_above(folder: Path) -> set[Identity]:
    """Identities of the folder and its parents, by its path and by its real path. A link to one of them would be circular."""
    real = Path(os.path.realpath(folder))
    return {identity_of(path) for path in {folder, *folder.parents, real, *real.parents}}


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
