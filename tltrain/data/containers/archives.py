"""The sources zip:FILE and tar:FILE: an archive of an image folder, read where it lies. Nothing is unpacked."""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from io import BufferedReader
from pathlib import Path

from tltrain.core.errors import UserError, some
from tltrain.core.files import open_regular
from tltrain.core.output import progress
from tltrain.core.recipe import Data
from tltrain.data.containers.contents import Contents, Extent, cached_contents, container
from tltrain.data.containers.packed import Packed, from_packed
from tltrain.data.dataset import Source, SourceKind
from tltrain.data.decode import SUFFIXES
from tltrain.data.sources.folder import in_classes
from tltrain.data.sources.layout import split_of
from tltrain.data.sources.names import check_utf8
from tltrain.data.sources.tree import SYSTEM, Below, Tree

COMPRESSED = {b"\x1f\x8b": "gunzip -k", b"BZh": "bunzip2 -k", b"\xfd7zXZ": "unxz -k", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of a compressed file, and what unpacks it and keeps it too."""
_LOCAL = struct.Struct("<4s22xHH")  # the header before the bytes of a file in a zip archive: signature, lengths of name and extra field


class ArchiveTree(Tree):
    """Folders and images of an archive by their names alone: nothing is looked up on the disk, and nothing is unpacked.

    A folder that holds everything else, as most archives have one, is entered: `root` is then a path below the archive. With depth, which
    counts levels as in a folder, it is entered only if it holds train, val or test.
    """

    def __init__(self, file: Path, names: Iterable[str], depth: int | None = None) -> None:
        self.root = file
        self.number: dict[Path, int] = {}
        """Place of each image among the names. Of two of the same name, the later counts, as where they are unpacked."""
        self._skipped = defaultdict(list)
        self._folders: dict[Path, set[Path]] = defaultdict(set)
        self._images: dict[Path, set[Path]] = defaultdict(set)
        self._others: dict[Path, list[str]] = defaultdict(list)
        for number, name in enumerate(names):
            self._add(number, name)
        self._entered = self._enter(depth)

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

    def _enter(self, depth: int | None) -> str:
        """Go down into the folder that holds everything. Returns its name; empty: there is none."""
        file = self.root
        while len(below := self.look(self.root).folders) == 1 and not self.look(self.root).images and not split_of(below[0].name):
            if not self.look(below[0]).folders:
                break  # the only class
            self.root = below[0]
        if depth is not None and not any(split_of(folder.name) for folder in self.look(self.root).folders):
            self.root = file
        return "" if self.root == file else self.root.relative_to(file).as_posix()


def _is_hidden(part: str) -> bool:
    return part.startswith(".")


def open_archive(kind: str, argument: str | None, spec: Data) -> Source:
    """Open an archive. Raises UserError if it is damaged, compressed as a whole, or laid out in a way that a folder may not be."""
    look, what = {"zip": (look_through_zip, "a zip archive"), "tar": (look_through_tar, "a tar archive")}[kind]
    file = container(argument, kind, what)
    contents = cached_contents(file, kind, look)
    tree = ArchiveTree(file, [extent.name for extent in contents.images], spec.depth)
    listed, notes = in_classes(tree, spec.depth)
    images = [Packed(sample, contents.file, contents.images[tree.number[sample.path]], contents.stamp) for sample in listed]
    return from_packed(images, f"{kind}:{file}", spec, (*contents.notes, *notes))


def look_through_zip(file: Path) -> Contents:
    """The files of a zip archive, stored or deflated. Raises UserError for one that is damaged, encrypted or packed in another way."""
    try:
        with open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
            infos = archive.infolist()
            locked = [info.filename for info in infos if info.flag_bits & 1]
            if locked:
                raise UserError(f"{file} is encrypted ({some(locked)}); unpack it, and give the folder as folder:PATH")
            other = [f"{i.filename} (method {i.compress_type})" for i in infos if i.compress_type not in (0, zipfile.ZIP_DEFLATED)]
            if other:
                raise UserError(f"{file} is packed in a way that is not read here: {some(other)}; pack it anew with `zip -r`")
            return Contents(file, tuple(_extent(opened, info, file.stat().st_size) for info in infos))
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        if tarfile.is_tarfile(file):
            raise UserError(f"{file} is a tar archive; name it tar:{file}") from error
        raise UserError(f"{file} is not a whole zip archive: {error}; copy or download it again, or test it with `unzip -t`") from error


def _extent(opened: BufferedReader, info: zipfile.ZipInfo, size: int) -> Extent:
    progress.alive()
    if info.is_dir():
        return Extent(info.filename, 0, 0)  # by its / a folder to `ArchiveTree`: one without images is refused
    opened.seek(info.header_offset)
    signature, name_length, extra_length = _LOCAL.unpack(opened.read(_LOCAL.size))
    start = info.header_offset + _LOCAL.size + name_length + extra_length
    if signature != b"PK\x03\x04" or start + info.compress_size > size:
        raise zipfile.BadZipFile(f"{info.filename} is not where its table of contents says")
    name = info.filename.replace("\\", "/")  # some programs of Windows write it so
    return Extent(name, start, info.compress_size, checksum=info.CRC, deflated=info.compress_type == zipfile.ZIP_DEFLATED)


def look_through_tar(file: Path) -> Contents:
    """The files of a tar archive. Raises UserError for one that is damaged or compressed."""
    files: dict[str, Extent] = {}
    images: list[Extent] = []
    links: list[str] = []
    for member in members(file):
        if member.islnk() and member.linkname in files:
            images.append(files[member.linkname]._replace(name=member.name))  # a second name of the same file
        elif member.isfile():
            files[member.name] = Extent(member.name, member.offset_data, member.size)
            images.append(files[member.name])
        elif member.isdir():
            images.append(Extent(f"{member.name}/", 0, 0))
        else:
            links.append(member.name)
    notes = (f"links and devices in the archive are passed over: {some(links)}",) if links else ()
    return Contents(file, tuple(images), notes)


def members(file: Path) -> list[tarfile.TarInfo]:
    """The members of a tar archive. Raises UserError for one that is damaged or compressed."""
    with open_regular(file) as opened:
        start = opened.read(6)
        if start.startswith(b"PK"):
            raise UserError(f"{file} is a zip archive; name it zip:{file}")
        unpack = next((command for magic, command in COMPRESSED.items() if start.startswith(magic)), None)
        if unpack is not None:
            raise UserError(
                f"{file} is compressed as a whole, so that no image in it can be read by itself; unpack it once: `{unpack} {file.name}`"
            )
        opened.seek(0)
        try:
            with tarfile.open(fileobj=opened, mode="r:") as archive:
                found = []
                for member in archive:
                    found.append(member)
                    progress.report(f"{file.name}: {len(found):,} files found")
                if sparse := [member.name for member in found if member.issparse()]:
                    raise UserError(
                        f"{file} holds files without the zeros in them (sparse ones, {some(sparse)}), which are not read; pack it anew "
                        "without --sparse"
                    )
                opened.seek(archive.offset)
                end = opened.read(20 * 512)  # tarfile ends without a word where a header is damaged or missing
                if len(end) < 512 or end.strip(b"\0"):
                    what = "it has no end" if len(end) < 512 else f"what stands at byte {archive.offset:,} begins no file"
                    raise tarfile.ReadError(what)
                return found
        except (tarfile.TarError, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file} is not a whole tar archive: {error}; copy or download it again, or pack it anew") from error


def _kind(name: str) -> SourceKind:
    opener: Callable[[str | None, Data, Path], Source] = lambda argument, spec, root: open_archive(name, argument, spec)  # noqa: E731
    return SourceKind(opener, argument="FILE", tree=True)


ZIP = _kind("zip")
TAR = _kind("tar")
