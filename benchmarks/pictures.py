"""Makes a data set of real pictures: 485 photos and drawings in eight classes, from Debian's package tuxpaint-stamps-default (GPL).

    apt-get download tuxpaint-stamps-default
    python -m benchmarks.pictures tuxpaint-stamps-default_*.deb pictures

The result is a folder for each class, for `data.source: folder:pictures`. Files with the same bytes are taken once. An installed package's
folder (/usr/share/tuxpaint/stamps) can be given in place of the file.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

CLASSES = ("animals", "clothes", "food", "household", "plants", "seasonal", "town", "vehicles")
STAMPS = "usr/share/tuxpaint/stamps/"


def pictures(source: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yields (path below the stamps' folder, content) of each PNG of the eight classes, sorted by path.

    source: the .deb file, or the folder of the installed package. Raises ValueError for anything else.
    """
    found = _in_folder(source) if source.is_dir() else _in_package(source)
    wanted = {path: content for path, content in found if path.suffix == ".png" and path.parts[0] in CLASSES}
    yield from sorted(wanted.items())


def extract(source: Path, folder: Path) -> dict[str, int]:
    """Write the pictures to a new folder, one folder for each class. Returns the number of pictures by class."""
    folder.mkdir(parents=True)
    counts = dict.fromkeys(CLASSES, 0)
    seen = set()
    for path, content in pictures(source):
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            continue
        seen.add(digest)
        target = folder / path.parts[0] / "-".join(path.parts[1:])
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
        counts[path.parts[0]] += 1
    return counts


def _in_folder(folder: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    return ((PurePosixPath(path.relative_to(folder)), path.read_bytes()) for path in folder.rglob("*.png"))


def _in_package(package: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """A .deb is an ar archive, which holds the files in data.tar with some compression."""
    name, content = next((member for member in _ar_members(package) if member[0].startswith("data.tar")), ("", b""))
    if not name:
        raise ValueError(f"{package} is no Debian package: it holds no data.tar")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for entry in archive:
            file = archive.extractfile(entry) if entry.isfile() else None
            if file is not None and entry.name.removeprefix("./").startswith(STAMPS):
                yield PurePosixPath(entry.name.removeprefix("./").removeprefix(STAMPS)), file.read()


def _ar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content). Each member has a header of 60 bytes: the name in the first 16, the size in bytes 48 to 58."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            return
        while header := file.read(60):
            size = int(header[48:58])
            yield header[:16].decode("ascii").strip().rstrip("/"), file.read(size)
            file.read(size % 2)  # members begin at even offsets


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the .deb file, or the folder of the installed package")
    parser.add_argument("folder", type=Path, help="the folder to make")
    arguments = parser.parse_args(argv)
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists; give a new folder")
    if not arguments.source.exists():
        parser.error(f"{arguments.source} does not exist; get it with: apt-get download tuxpaint-stamps-default")
    counts = extract(arguments.source, arguments.folder)
    print(", ".join(f"{name} {num}" for name, num in counts.items()), f"= {sum(counts.values())} pictures in {arguments.folder}")


if __name__ == "__main__":
    main()
