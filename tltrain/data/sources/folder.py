"""The source folder:PATH: one subfolder per class, directly in PATH or in its train, val and test."""

from __future__ import annotations

import contextlib
import stat
from collections import Counter
from pathlib import Path

import numpy as np

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.core.schema.data import is_url
from tltrain.data.dataset import Source, SourceKind
from tltrain.data.decode import SUFFIXES
from tltrain.data.sources.image_list import from_files
from tltrain.data.sources.layout import find_classes
from tltrain.data.sources.names import shown
from tltrain.data.sources.tree import Tree, is_run, unreadable
from tltrain.data.tables.listing import Listing
from tltrain.data.tables.texts import Texts, joined


def open_folder(argument: str, spec: Data) -> Source:
    """Open an image folder. Raises UserError if it is missing, has no class folders, or has a class without images."""
    if is_url(argument):
        raise UserError(f"data.source is folder:{argument}; a folder is read on this machine alone: pack it, and give zip:URL or tar:URL")
    root = _root(argument)
    if not argument or not _is_folder(root):
        message = f"data.source is folder:{argument}; {root} is not a folder; give one with a subfolder of images for each class"
        raise UserError(shown(message))
    listed, notes = in_classes(Tree(root), spec.depth)
    return from_files(listed, f"folder:{root}", spec, notes)


def open_loose(argument: str, spec: Data) -> Source:
    """Every image below a folder, in subfolders or right in it, without a label. Raises UserError if it is missing or has no image."""
    root = _root(argument)
    if not argument or not _is_folder(root):
        raise UserError(shown(f"data.source is folder:{argument}; {root} is not a folder; give one that holds images"))
    tree = Tree(root)
    return from_files(without_classes(tree, f"data.source is folder:{argument}"), f"folder:{root}", spec, tree.notes(), labelled=False)


def without_classes(tree: Tree, what: str) -> Listing:
    """Every image of a tree, all of train and of no class. what: how the UserError begins where there is none."""
    root = tree.root
    names = [_below(root, place, files) for place, files in tree.by_folder(root, Counter()) if files]
    if not names:
        raise UserError(shown(f"{what}; {root} holds no image ({' '.join(SUFFIXES)})"))
    ids = joined(names)
    zero_N = np.zeros(len(ids), dtype=np.int64)
    return Listing(ids.with_prefix(f"{str(root).rstrip('/')}/"), ids, zero_N, ("train",), zero_N, ("",))


def in_classes(tree: Tree, depth: int | None = None) -> tuple[Listing, tuple[str, ...]]:
    """The images of the class folders of a tree, and notes. Raises UserError as `find_classes`, and for a class without images.

    depth: data.depth.
    """
    root = tree.root
    folders, notes = find_classes(tree, depth)
    others = Counter(tree.look(root).others)
    above = {folder for _, place, _ in folders for folder in place.parents if folder.is_relative_to(root)} - {root}
    others.update(suffix for place in above for suffix in tree.look(place).others)
    names: list[Texts] = []
    num_images = []
    for split, folder, _ in folders:
        inside: Counter[str] = Counter()
        found = [_below(root, place, files) for place, files in tree.by_folder(folder, inside) if files]
        if not found and split == "train":
            raise UserError(_empty(folder, inside, any(place.split != "train" for place in folders)))
        names += found
        num_images.append(sum(map(len, found)))
        others += inside
    if others:
        kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in sorted(others.items()))
        notes += (f"files that are not images by their suffix are left out: {kinds}",)
    splits, labels = (tuple(dict.fromkeys(names)) for names in ([split for split, _, _ in folders], [label for _, _, label in folders]))
    split_N = np.repeat([splits.index(split) for split, _, _ in folders], num_images)
    number_of = {label: k for k, label in enumerate(labels)}
    label_N = np.repeat([number_of[label] for _, _, label in folders], num_images)
    ids = joined(names)
    listing = Listing(ids.with_prefix(f"{str(root).rstrip('/')}/"), ids, split_N, splits, label_N, labels)
    return listing, (*notes, *tree.notes())


def _below(root: Path, folder: Path, files: list[str]) -> Texts:
    """The names of a folder's files relative to the root, as they are written everywhere."""
    place = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    return Texts.of(f"{place}{name}" for name in files)


def check_apart(source: str, run: Path) -> None:
    """Raise UserError if a new run folder would lie inside its own image folder."""
    kind, _, argument = source.partition(":")
    if kind != "folder" or not argument or is_run(run):
        return
    root = _root(argument).resolve()
    if root in (run.resolve(), *run.resolve().parents):
        raise UserError(f"the run folder {run} would lie among the images of {source}; choose one elsewhere with --folder, or put the "
                        "images into a folder of their own")  # fmt: skip


def _root(argument: str) -> Path:
    with contextlib.suppress(RuntimeError):  # ~x without a user x
        return Path(argument).expanduser().absolute()
    return Path(argument).absolute()


def _is_folder(path: Path) -> bool:
    """Whether the path is a folder. Raises UserError if permissions prevent the check."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error


def _empty(folder: Path, inside: Counter[str], has_splits: bool) -> str:
    """The error message for a class without training images."""
    contents = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in sorted(inside.items()))
    out = f"take {folder.name} out of every split" if has_splits else "remove the folder"
    return f"class folder {folder} has no image ({' '.join(SUFFIXES)}){f', but files: {contents}' if contents else ''}; add images or {out}"


FOLDER = SourceKind(lambda argument, spec, root: open_folder(argument or "", spec), argument="PATH", tree=True)
