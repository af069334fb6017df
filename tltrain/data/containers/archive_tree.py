"""The files of an archive as a tree of folders, with the rules that hold for folders on a disk."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tltrain.core.errors import some
from tltrain.data.decode import SUFFIXES
from tltrain.data.sources.layout import split_of
from tltrain.data.sources.names import check_utf8
from tltrain.data.sources.tree import SYSTEM, Below, Tree


class ArchiveTree(Tree):
    """Folders and images of an archive by their names alone: nothing is looked up on the disk, and nothing is unpacked.

    A folder that holds everything else, as most archives have one, is entered: `root` is then a path below the archive.
    """

    def __init__(self, file: Path, names: Iterable[str]) -> None:
        self.root = file
        self.number: dict[Path, int] = {}
        """Place of each image among the names. Of two of the same name, the later counts, as where they are unpacked."""
        self._skipped = defaultdict(list)
        self._folders: dict[Path, set[Path]] = defaultdict(set)
        self._images: dict[Path, set[Path]] = defaultdict(set)
        self._others: dict[Path, list[str]] = defaultdict(list)
        for number, name in enumerate(names):
            self._add(number, name)
        self._entered = self._enter()

    def look(self, folder: Path) -> Below:
        folders, images = sorted(self._folders.get(folder, ())), sorted(self._images.get(folder, ()))
        return Below(tuple(folders), tuple(images), tuple(self._others.get(folder, ())))

    def identity(self, folder: Path) -> str:  # no folder has two names here
        return str(folder)

    def notes(self) -> tuple[str, ...]:
        entered = (f"all of it lies in {self._entered}: read from there",) if self._entered else ()
        return (*entered, *(f"passed over, {kind}: {some(sorted(set(names)))}" for kind, names in sorted(self._skipped.items())))

    def _add(self, number: int, name: str) -> None:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        is_image = os.path.splitext(name)[1].lower() in SUFFIXES
        for kind, is_skipped in (("hidden", _is_hidden), ("folders of the system", lambda part: part.casefold() in SYSTEM)):
            if any(map(is_skipped, parts)):
                if is_image:
                    self._skipped[kind].append(name)
                return
        path = self.root.joinpath(*parts)
        place = path.relative_to(self.root)
        for folder in (*place.parents[:-1], *([place] if name.endswith("/") and parts else ())):  # of files that are no images too
            self._folders[(self.root / folder).parent].add(self.root / folder)
        if not is_image or name.endswith("/"):
            if not name.endswith("/"):
                self._others[path.parent].append(os.path.splitext(name)[1].lower())
            return
        check_utf8(path)
        if path in self.number:
            self._skipped["an earlier file of the same name"].append(name)
        self.number[path] = number
        self._images[path.parent].add(path)

    def _enter(self) -> str:
        """Go down into the folder that holds everything. Returns its name; empty: there is none."""
        file = self.root
        while len(below := self.look(self.root).folders) == 1 and not self.look(self.root).images and not split_of(below[0].name):
            if not self.look(below[0]).folders:
                break  # the only class
            self.root = below[0]
        return "" if self.root == file else self.root.relative_to(file).as_posix()


def _is_hidden(part: str) -> bool:
    return part.startswith(".")
