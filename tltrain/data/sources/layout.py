"""Finds the classes and splits of an image folder by its layout. Refuses ambiguous layouts with a remedy."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tltrain.core.errors import UserError, some
from tltrain.data.sources.names import counted
from tltrain.data.sources.tree import Tree

SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Accepted names of a split in folders and tables, in lower case."""
_NEARLY = re.compile(r"[\W_]*(?:set|images|imgs|data|split)?[\W_]*\d*$")


class ClassFolder(NamedTuple):
    """The images of one class in one split: those in the folder and below it."""

    split: str
    folder: Path
    label: str
    """Name of the class. Of a tree of classes: the path from its top, such as animals/birds/owl."""


def split_of(name: str) -> str | None:
    """train, val or test for one of their accepted names, in any case. Else None."""
    return SPLITS.get(name.strip().lower())


def find_classes(tree: Tree, depth: int | None = None) -> tuple[list[ClassFolder], tuple[str, ...]]:
    """The sorted class folders, and notes on images without a class.

    If the root has a train folder with subfolders, it has splits. Otherwise its own subfolders are the classes.
    depth: data.depth, the levels of folders that are classes; deeper folders belong to them. None: one.
    Raises UserError, with a suggestion, for a layout that fits neither.
    """
    root, top = tree.root, tree.look(tree.root)
    if not top.folders:
        contents = f"{len(top.images)} images and no subfolders" if top.images else "no subfolders"
        raise UserError(f"{root} has {contents}; put the images of each class into a subfolder of that name, or list them in csv:FILE")
    meant = {folder: split for folder in top.folders if (split := split_of(folder.name))}
    train = [folder for folder, split in meant.items() if split == "train"]
    if len(meant) == len(top.folders) and not train:
        raise UserError(f"{root} has {some(_names(meant))} and no train; add the training images as train/CLASS/")
    if not any(tree.look(folder).folders for folder in train):
        folders, deeper = _in_depth(tree, _classes(tree, depth), depth)
        return folders, (*_loose(tree, root), *_called_train(train), *deeper)
    for name in ("train", "val", "test"):
        same = [folder for folder, split in meant.items() if split == name]
        if len(same) > 1:
            raise UserError(f"{root} has {some(_names(same))}, two of which mean {name}; keep one of them")
    folders, deeper = _in_depth(tree, _split_classes(tree, meant, depth), depth)
    _refuse_strange(tree, folders)
    return folders, (*_loose(tree, root), *_unused(tree, meant), *deeper)


def _in_depth(tree: Tree, top: list[ClassFolder], depth: int | None) -> tuple[list[ClassFolder], tuple[str, ...]]:
    """The classes below folders of the first level, down to `depth` levels, and notes on images above them.

    A folder that has no folders is a class even if it lies higher. Raises UserError if none lies so deep.
    """
    if depth is None:
        nested = [place.label for place in top if len((below := tree.look(place.folder)).folders) > 1 and not below.images]
        note = "class folders of folders, whose images count as theirs (data.depth: 2 makes classes of those)"
        return top, ((f"{note}: {some(list(dict.fromkeys(nested)))}",) if nested else ())
    found: list[ClassFolder] = []
    notes: list[str] = []
    waiting = list(reversed(top))
    while waiting:
        place = waiting.pop()
        below = tree.look(place.folder)
        if place.label.count("/") + 1 == depth or not below.folders:
            found.append(place)
            continue
        if below.images:
            notes.append(f"{counted(len(below.images))} right in {place.folder.relative_to(tree.root)}, above its classes: not used")
        waiting += [ClassFolder(place.split, folder, f"{place.label}/{folder.name}") for folder in reversed(below.folders)]
    deepest = max(place.label.count("/") + 1 for place in found)
    if deepest < depth:
        raise UserError(
            f"data.depth is {depth}, and {tree.root} has no folder of classes at that level; its deepest are at level {deepest}"
        )
    return found, tuple(notes)


def _classes(tree: Tree, depth: int | None) -> list[ClassFolder]:
    """The root's own subfolders as classes. Raises UserError if they look like splits, or if the classes are one level deeper."""
    root, folders = tree.root, tree.look(tree.root).folders
    if len(folders) == 1 and (depth is None or any(split_of(folder.name) == "train" for folder in tree.look(folders[0]).folders)):
        _refuse_wrapper(tree, folders[0])
    exact = [folder for folder in folders if split_of(folder.name)]
    called = {folder: split for folder in folders if (split := _like_split(folder.name))}
    alone = [split_of(folder.name) for folder in exact] == ["train"]  # "train" may be a class, beside "bus"
    if (exact and not alone) or {"train"} < set(called.values()):
        are = "are called like splits" if len(called) > 1 else "is called like a split"
        raise UserError(f"{root}: {some(_names(called))} {are}, and would be learned as a class; {_remedy(tree, called)}")
    below = {tuple(_names(tree.look(folder).folders)) for folder in folders}
    inner = next(iter(below))
    is_same = depth is None and len(folders) > 1 and len(below) == 1 and not any(tree.look(folder).images for folder in folders)
    if is_same and (len(inner) > 1 or any(map(_like_split, inner))):
        raise UserError(
            f"{root}: {some(_names(folders))} all hold the same subfolders, {some(inner)}, and either may be the classes; if the "
            "inner ones are, put train, val and test above them (train/CLASS/); if the outer ones are, put the images right into them, or "
            "say data.depth: 1; if both are, as in a tree, say data.depth: 2; or list them in csv:FILE with path, label and split"
        )
    return [ClassFolder("train", folder, folder.name) for folder in folders]


def _refuse_wrapper(tree: Tree, folder: Path) -> None:
    """Raise UserError if the only subfolder contains the data folder that was probably meant."""
    inner = folder
    while len(tree.look(inner).folders) == 1 and not tree.look(inner).images and not split_of(tree.look(inner).folders[0].name):
        inner = tree.look(inner).folders[0]
    if tree.look(inner).folders:
        contents = some(_names(tree.look(inner).folders))
        meant = shlex.quote(f"folder:{inner}")
        raise UserError(f"{tree.root} holds nothing but {inner.relative_to(tree.root)}, which holds {contents}; did you mean {meant}?")


def _remedy(tree: Tree, called: dict[Path, str]) -> str:
    """The remedy for folders with names like splits that are not laid out as splits."""
    train = [folder for folder, split in called.items() if split == "train"]
    if any(tree.look(folder).folders for folder in train):  # Trainset/cat
        moves = [(folder, folder.with_name(split)) for folder, split in called.items() if not split_of(folder.name)]
        return "rename: " + "; ".join(shlex.join(["mv", str(old), str(new)]) for old, new in moves)
    if train:
        return (
            f"put the training images of each class into {tree.root / 'train'}/CLASS/, or list all in csv:FILE with path, label and split"
        )
    return (
        "if it is a class, give the folder another name; if its images have no label, move it elsewhere; as a split it needs train/CLASS/"
    )


def _split_classes(tree: Tree, meant: dict[Path, str], depth: int | None) -> list[ClassFolder]:
    """The class folders in train, val and test. Raises UserError if train's subfolders cannot be classes."""
    class_folders = [ClassFolder(split, folder, folder.name) for place, split in meant.items() for folder in tree.look(place).folders]
    trained = [place.folder for place in class_folders if place.split == "train"]
    place = trained[0].parent
    inner_splits = {split_of(folder.name) for folder in trained}
    if None not in inner_splits and len(inner_splits) > 1:
        suggestion = shlex.quote(f"folder:{place}")
        raise UserError(f"{place} holds {some(_names(trained))}, which are called like splits; did you mean {suggestion}?")
    inner = tree.look(trained[0]).folders
    if len(trained) == 1 and len(inner) > 1 and depth is None:
        contents = f"{trained[0].name} alone, which holds {some(_names(inner))}"
        raise UserError(f"{place} holds {contents}; if those are the classes, move them up into {place}, "
                        "or say data.depth: 2, which names them by both folders")  # fmt: skip
    return class_folders


def _refuse_strange(tree: Tree, folders: list[ClassFolder]) -> None:
    """Raise UserError if val or test has a class that train has not."""
    names = {place.label for place in folders if place.split == "train"}
    strange = [place for place in folders if place.label not in names]
    if strange:
        listed = some([place.folder.relative_to(tree.root).as_posix() for place in strange])
        raise UserError(f"{tree.root}: {listed} has no counterpart below train; {_counterpart(strange, names)}")


def _counterpart(strange: list[ClassFolder], trained: set[str]) -> str:
    near = {name.casefold(): name for name in trained}
    label = next((place.label for place in strange if place.label.casefold() in near), None)
    if label is not None:
        return f"class names are compared letter by letter: rename {label} to {near[label.casefold()]}"
    return "every class needs training images: add some, or take the folder out of the data (images without a label are not used)"


def _loose(tree: Tree, folder: Path) -> tuple[str, ...]:
    """A note on images directly in a folder that should hold only class folders."""
    num = len(tree.look(folder).images)
    place = "beside the class folders" if folder == tree.root else f"right in {folder.name}"
    return (f"{counted(num)} {place} without a class: not used",) if num else ()


def _called_train(train: list[Path]) -> tuple[str, ...]:
    """A note on a class with the name of the split."""
    if not train:
        return ()
    name = train[0].name
    return (f"{name} holds images and no class folders: {name} is learned as a class, beside the others",)


def _unused(tree: Tree, meant: dict[Path, str]) -> Iterator[str]:
    """Notes on folders beside train, and on splits without class folders."""
    for folder in tree.look(tree.root).folders:
        if folder not in meant:
            others: Counter[str] = Counter()
            contents = counted(sum(1 for _ in tree.images(folder, others)))
            contents += f" and {counted(others.total(), 'other file')}" if others else ""
            near = f" (call it {split} if it is one)" if (split := _like_split(folder.name)) else ""
            yield f"{folder.name} stands beside train and is not called like a split{near}: its {contents} are not used"
        elif tree.look(folder).folders:
            yield from _loose(tree, folder)
        else:
            yield f"{folder.name} has no class folders: its {counted(len(tree.look(folder).images))} have no label and are not used"


def _like_split(name: str) -> str | None:
    """train, val or test for a name that begins like one, such as train2017, test_images or Trainset. Else None."""
    low = name.strip().lower()
    for word in sorted(SPLITS, key=len, reverse=True):
        if low.startswith(word) and _NEARLY.fullmatch(low[len(word) :]):
            return SPLITS[word]
    return None


def _names(folders: Iterable[Path]) -> list[str]:
    return [folder.name for folder in folders]
