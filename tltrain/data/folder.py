"""folder:PATH: one subfolder per class, either at once or below train, val and test."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tltrain.data.decode import SUFFIXES
from tltrain.data.images import Source, SourceKind
from tltrain.data.listing import Listed, from_files
from tltrain.data.scan import some
from tltrain.errors import UserError
from tltrain.recipe import Data

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def open_folder(argument: str, spec: Data) -> Source:
    """Raises UserError for a folder that is missing, has no classes, or has an empty one."""
    root = Path(argument).expanduser().absolute()
    if not argument or not root.is_dir():
        raise UserError(f"data.source is folder:{argument}; {root} is not a folder; give one with a subfolder of images for each class")
    skipped: Counter[str] = Counter()
    listed = [
        Listed(path, path.relative_to(root).as_posix(), split, folder.name)
        for split, folder in _class_folders(root)
        for path in _images(folder, skipped)
    ]
    notes: tuple[str, ...] = ()
    if skipped:
        kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in sorted(skipped.items()))
        notes = (f"files that are not images by their suffix are left out: {kinds}",)
    return from_files(listed, f"folder:{root}", spec.max_unreadable, notes)


def _class_folders(root: Path) -> list[tuple[str, Path]]:
    """(split, class folder), sorted. A root whose train has subfolders has splits; else its own subfolders are the classes."""
    top = _subfolders(root)
    names = {folder.name for folder in top}
    splits = {name: SPLITS[name] for name in names & set(SPLITS)}
    if not top:
        raise UserError(f"{root} has no subfolders; put the images of each class into a subfolder of that name")
    if names == set(splits) and "train" not in splits:
        raise UserError(f"{root} has {some(sorted(names))} and no train; add the training images as train/CLASS/")
    if "train" not in splits or not _subfolders(root / "train"):
        return [("train", folder) for folder in top]
    if len(set(splits.values())) < len(splits):
        raise UserError(f"{root} has {some(sorted(splits))}, two of which mean val; keep one of them")
    found = [(split, folder) for name, split in sorted(splits.items()) for folder in _subfolders(root / name)]
    trained = {folder.name for split, folder in found if split == "train"}
    strange = [f"{split}/{folder.name}" for split, folder in found if folder.name not in trained]
    if strange:
        raise UserError(f"{root}: {some(strange)} has no counterpart below train; every class needs training images")
    return found


def _images(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Images below a class folder, in a fixed order; other files are counted by suffix. Raises UserError if there are none."""
    empty = True
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(here, name)
            if path.suffix.lower() in SUFFIXES:
                empty = False
                yield path
            else:
                skipped[path.suffix.lower()] += 1
    if empty:
        raise UserError(f"class folder {folder} has no image ({' '.join(SUFFIXES)}); add images or remove the folder")


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


FOLDER = SourceKind(lambda argument, spec, root: open_folder(argument or "", spec), argument="PATH")
