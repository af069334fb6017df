"""Finds the classes and splits of an image folder by its layout. Refuses ambiguous layouts with a remedy."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

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

ClassFolder = tuple[str, Path]
"""(split, folder)."""


def split_of(name: str) -> str | None:
    """train, val or test for one of their accepted names, in any case. Else None."""
    return SPLITS.get(name.strip().lower())


def find_classes(tree: Tree) -> tuple[list[ClassFolder], tuple[str, ...]]:
    """The sorted class folders, and notes on images without a class.

    If the root has a train folder with subfolders, it has splits. Otherwise its own subfolders are the classes.
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
        return _classes(tree), (*_loose(tree, root), *_called_train(train))
    for name in ("train", "val", "test"):
        same = [folder for folder, split in meant.items() if split == name]
        if len(same) > 1:
            raise UserError(f"{root} has {some(_names(same))}, two of which mean {name}; keep one of them")
    return _split_classes(tree, meant), (*_loose(tree, root), *_unused(tree, meant))


def _classes(tree: Tree) -> list[ClassFolder]:
    """The root's own subfolders as classes. Raises UserError if they look like splits, or if the classes are one level deeper."""
    root, folders = tree.root, tree.look(tree.root).folders
    if len(folders) == 1:
        _refuse_wrapper(tree, folders[0])
    exact = [folder for folder in folders if split_of(folder.name)]
    called = {folder: split for folder in folders if (split := _like_split(folder.name))}
    alone = [split_of(folder.name) for folder in exact] == ["train"]  # "train" may be a class, beside "bus"
    if (exact and not alone) or {"train"} < set(called.values()):
        are = "are called like splits" if len(called) > 1 else "is called like a split"
        raise UserError(f"{root}: {some(_names(called))} {are}, and would be learned as a class; {_remedy(tree, called)}")
    below = {tuple(_names(tree.look(folder).folders)) for folder in folders}
    inner = next(iter(below))
    is_same = len(folders) > 1 and len(below) == 1 and not any(tree.look(folder).images for folder in folders)
    if is_same and (len(inner) > 1 or any(map(_like_split, inner))):
        raise UserError(
            f"{root}: {some(_names(folders))} all hold the same subfolders, {some(inner)}, and either may be the classes; if the "
            "inner ones are, put train, val and test above them (train/CLASS/); if the outer ones are, put the images right into them; or "
            "list them in csv:FILE with path, label and split"
        )
    return [("train", folder) for folder in folders]


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


def _split_classes(tree: Tree, meant: dict[Path, str]) -> list[ClassFolder]:
    """The class folders in train, val and test. Raises UserError if train's subfolders cannot be classes, or another split has more."""
    class_folders = [(split, folder) for place, split in meant.items() for folder in tree.look(place).folders]
    trained = [folder for split, folder in class_folders if split == "train"]
    place = trained[0].parent
    inner_splits = {split_of(folder.name) for folder in trained}
    if None not in inner_splits and len(inner_splits) > 1:
        suggestion = shlex.quote(f"folder:{place}")
        raise UserError(f"{place} holds {some(_names(trained))}, which are called like splits; did you mean {suggestion}?")
    inner = tree.look(trained[0]).folders
    if len(trained) == 1 and len(inner) > 1:
        contents = f"{trained[0].name} alone, which holds {some(_names(inner))}"
        raise UserError(f"{place} holds {contents}; if those are the classes, move them up into {place}")
    names = {folder.name for folder in trained}
    strange = [folder for split, folder in class_folders if split != "train" and folder.name not in names]
    if strange:
        listed = some([folder.relative_to(tree.root).as_posix() for folder in strange])
        raise UserError(f"{tree.root}: {listed} has no counterpart below train; {_counterpart(strange, names)}")
    return class_folders


def _counterpart(strange: list[Path], trained: set[str]) -> str:
    near = {name.casefold(): name for name in trained}
    folder = next((folder for folder in strange if folder.name.casefold() in near), None)
    if folder is not None:
        return f"class names are compared letter by letter: rename {folder.name} to {near[folder.name.casefold()]}"
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
