"""The source lmdb:PATH: a database of LMDB whose values are image files. They are read from its file by their places.

Two layouts are known: keys `image-X` with the class of each in `label-X`, and keys that are the paths of an image folder.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.core.errors import UserError, some
from tltrain.core.output import progress
from tltrain.core.recipe import Data
from tltrain.data.containers.archives import ArchiveTree
from tltrain.data.containers.contents import Contents, Extent, cached_contents, container
from tltrain.data.containers.packed import Packed, from_packed, numbers_first, of_contents
from tltrain.data.containers.several import names_of, splits_of, with_progress
from tltrain.data.dataset import Source, SourceKind
from tltrain.data.remote.copies import local
from tltrain.data.sources.folder import in_classes
from tltrain.data.tables.listing import Listed

FILE = "data.mdb"
"""The database within the folder that LMDB makes."""
IMAGE, LABEL = "image-", "label-"
LAYOUTS = "keys image-X with the class in label-X, or keys that are paths, such as cat/1.jpg or train/cat/1.jpg"


def open_lmdb(argument: str | None, spec: Data) -> Source:
    """Open a database, or a folder of one for each split. Raises UserError for one that is damaged, and for an image without a class."""
    origin = f"lmdb:{argument or ''}"
    files = _files(argument, origin)
    names = names_of([file.parent if file.name == FILE else file for file in files])
    splits, notes = splits_of(names, f"data.source is {origin}") if len(files) > 1 else (["train"], ())
    is_said = bool(notes)
    images: list[Packed] = []
    for file, name, split in zip(with_progress(files), names, splits, strict=True):
        contents = cached_contents(file, "lmdb", look_through)
        notes += contents.notes
        if all(extent.label for extent in contents.images):
            if spec.depth is not None:
                raise UserError(f"data.depth is of folders, and the keys of {file} are no paths; leave it out")
            images += of_contents(contents, name, file, split)
            continue
        tree = ArchiveTree(file, [extent.name for extent in contents.images], spec.depth)
        listed, found = in_classes(tree, spec.depth)
        notes += found
        of_file = _split_of_file(listed, split if is_said else "", file)
        images += [
            Packed(_of_file(image, of_file, name, len(files) > 1), file, contents.images[tree.number[image.path]], contents.stamp)
            for image in listed
        ]
    return from_packed(images, origin, spec, tuple(dict.fromkeys(notes)), numbers_first([image.listed.label for image in images]))


def look_through(file: Path) -> Contents:
    """The images of a database: with their classes where those have keys of their own. Raises UserError."""
    with _values(file) as value_of, file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        pairs = {key: value for key, value in value_of.items() if key.startswith(IMAGE)}
        if not pairs:
            _refuse_pickles(value_of, file)
            return Contents(file, tuple(_extents(value_of, whole, file, {})))
        missing = [f"{LABEL}{key.removeprefix(IMAGE)}" for key in pairs if f"{LABEL}{key.removeprefix(IMAGE)}" not in value_of]
        if missing:
            raise UserError(f"{file}: {len(missing):,} of {len(pairs):,} images have no class; these keys are not there: {some(missing)}")
        labels = {key: _label(value_of[f"{LABEL}{key.removeprefix(IMAGE)}"], key, file) for key in pairs}
        said = bytes(value_of.get("num-samples", b"")).strip()
        if said.isdigit() and int(said) != len(pairs):
            raise UserError(f"{file}: num-samples is {int(said):,}, and {len(pairs):,} keys begin with {IMAGE}; write the database anew")
        return Contents(file, tuple(_extents(pairs, whole, file, labels)))


def _files(argument: str | None, origin: str) -> list[Path]:
    """The files of the databases that PATH means: itself, its data.mdb, or those in a folder of several. Raises UserError."""
    path = local(argument)
    if argument and (path / FILE).is_file():
        return [path / FILE]
    if argument and path.is_dir():
        inner = sorted({*(file.parent / FILE for file in path.glob(f"*/{FILE}")), *path.glob("*.lmdb"), *path.glob("*.mdb")})
        if not (found := [file for file in inner if file.is_file()]):
            raise UserError(f"data.source is {origin}, a folder without {FILE}; give the folder or the file of a database of LMDB")
        return found
    return [container(argument, "lmdb", "the folder or the file of a database of LMDB")]


@contextmanager
def _values(file: Path) -> Iterator[Mapping[str, memoryview]]:
    """Key to value, which lies in the mapped file, for all of a database. Raises UserError where it is damaged."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f"databases of LMDB are read by lmdb, which is not here ({error}): pip install 'tltrain[lmdb]'") from error
    try:
        with lmdb.open(str(file), subdir=False, readonly=True, lock=False, create=False, readahead=False) as database:
            needed = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
            if needed > (size := file.stat().st_size):  # to read there would end the process
                raise UserError(f"{file} is cut: it has {size:,} bytes and needs {needed:,}; copy or download it again")
            with database.begin(buffers=True) as transaction:
                found = {}
                for key, value in transaction.cursor():
                    found[bytes(key).decode()] = value
                    progress.report(f"{file.name}: {len(found):,} keys read")
                yield found
    except (lmdb.Error, OSError) as error:
        raise UserError(f"{file} is not a whole database of LMDB: {error}; copy or download it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: a key is no text ({error}); images are found by {LAYOUTS}") from error


def _extents(values: Mapping[str, memoryview], whole: mmap.mmap, file: Path, labels: Mapping[str, str]) -> Iterator[Extent]:
    """The bytes of the file that each value is. Raises UserError where another process writes the database."""
    first = next((value for value in values.values() if len(value)), None)
    base = 0 if first is None else _base(first, values, whole, file)
    for key, value in values.items():
        yield Extent(key, _address(value) - base if len(value) else 0, len(value), labels.get(key, ""))


def _base(first: memoryview, values: Mapping[str, memoryview], whole: mmap.mmap, file: Path) -> int:
    """Where the file begins in memory, by its contents: LMDB says where a value lies in memory alone."""
    place = whole.find(first)
    while place >= 0:
        base = _address(first) - place
        if base % mmap.PAGESIZE == 0 and all(_is_at(value, base, whole) for value in values.values() if len(value)):
            return base
        place = whole.find(first, place + 1)  # an older copy of the same value
    raise UserError(f"{file} changes while it is read; start again once nobody writes it")


def _is_at(value: memoryview, base: int, whole: mmap.mmap) -> bool:
    start = _address(value) - base
    progress.alive()
    return start >= 0 and whole[start : start + len(value)] == value


def _address(value: memoryview) -> int:
    return int(np.frombuffer(value, np.uint8).ctypes.data)


def _label(value: Any, key: str, file: Path) -> str:
    try:
        if text := bytes(value).decode().strip():
            return text
    except UnicodeDecodeError:
        pass
    raise UserError(f"{file}: the class of {key} is {bytes(value)[:20]!r}; it is a number or a name, written as text")


def _refuse_pickles(values: Mapping[str, memoryview], file: Path) -> None:
    """Raise UserError where no key is the path of an image."""
    tree = ArchiveTree(file, values)
    if not tree.number:
        pickled = next((key for key, value in values.items() if bytes(value[:1]) == b"\x80"), None)
        why = f"; its values, such as that of {pickled}, are Python's pickles, which are not read: they can run programs" if pickled else ""
        raise UserError(f"{file} holds no image whose key says so, of {some(list(values)[:3])}{why}; images are found by {LAYOUTS}")


def _split_of_file(listed: Iterable[Listed], said: str, file: Path) -> str:
    """The split of all images of a database, from its name. Empty: the keys have splits, or the name says none.

    said: what the name says. Raises UserError where the keys say another.
    """
    by_keys = {image.split for image in listed if not image.id.startswith(f"{image.label}/")}  # the keys begin with train/, val/ or test/
    if said and by_keys and by_keys != {said}:
        raise UserError(f"{file} is called {said}, and its keys begin with {some(sorted(by_keys))}; give it a name without a split, or "
                        "write it with keys such as cat/1.jpg")  # fmt: skip
    return "" if by_keys else said


def _of_file(image: Listed, split: str, name: str, is_one_of_several: bool) -> Listed:
    return image._replace(split=split or image.split, id=f"{name}/{image.id}") if is_one_of_several else image


LMDB = SourceKind(lambda argument, spec, root: open_lmdb(argument, spec), argument="PATH", tree=True)
