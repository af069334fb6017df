"""The same digits in the form of each source, for what holds of every source: written by each format's own library."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from container_files import Row, digit_rows, tar_file
from published_files import dtd

NAMES = ("zero", "one", "two")


def _named(rows: Sequence[Row]) -> list[tuple[str, bytes]]:
    return [(f"{row.split}/digit {row.label}/{i:03}.png", row.content) for i, row in enumerate(rows)]


def _folder(root: Path, rows: Sequence[Row], labelled: bool) -> str:
    for name, content in _named(rows):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return f"folder:{root}"


def _csv(root: Path, rows: Sequence[Row], labelled: bool) -> str:
    lines = ["path,split,label" if labelled else "path,split"]
    for i, row in enumerate(rows):
        (root / f"{i:03}.png").write_bytes(row.content)
        lines.append(f"{i:03}.png,{row.split}" + (f",{NAMES[row.label]}" if labelled else ""))
    (root / "digits.csv").write_text("\n".join(lines) + "\n")
    return f"csv:{root / 'digits.csv'}"


def _zip(root: Path, rows: Sequence[Row], labelled: bool) -> str:
    with zipfile.ZipFile(root / "digits.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in _named(rows):
            archive.writestr(name, content)
    return f"zip:{root / 'digits.zip'}"


def _tar(root: Path, rows: Sequence[Row], labelled: bool) -> str:
    return f"tar:{tar_file(root / 'digits.tar', _named(rows))}"


def _of(rows: Sequence[Row], split: str) -> list[Row]:
    return [row for row in rows if row.split == split]


def _webdataset(root: Path, rows: Sequence[Row], labelled: bool) -> str:
    for split in ("train", "val", "test"):
        members = []
        for i, row in enumerate(_of(rows, split)):
            members += [(f"{i}.png", row.content), *([(f"{i}.cls", str(row.label).encode())] if labelled else [])]
        tar_file(root / f"{split}-0.tar", members)
    return f"webdataset:{root}/*.tar"


def _parquet(root: Path, rows: Sequence[Row], labelled: bool) -> str:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns: dict[str, list[Any]] = {"image": [row.content for row in rows], "split": [row.split for row in rows]}
    pq.write_table(pa.table(columns | ({"label": [row.label for row in rows]} if labelled else {})), root / "digits.parquet")
    return f"parquet:{root / 'digits.parquet'}"


def _hugging_face(root: Path, rows: Sequence[Row], labelled: bool) -> str:
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), **({"label": datasets.ClassLabel(names=list(NAMES))} if labelled else {})}
    parts = {}
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        columns: dict[str, list[Any]] = {"image": [{"bytes": row.content, "path": None} for row in _of(rows, split)]}
        columns |= {"label": [row.label for row in _of(rows, split)]} if labelled else {}
        parts[name] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict(parts).save_to_disk(root / "saved")
    return f"hf:{root / 'saved'}"


def _lmdb(root: Path, rows: Sequence[Row], labelled: bool) -> str:
    lmdb = pytest.importorskip("lmdb")
    for split in ("train", "val", "test"):
        with lmdb.open(str(root / f"{split}_lmdb"), map_size=2**24) as database, database.begin(write=True) as transaction:
            for i, row in enumerate(_of(rows, split)):
                transaction.put(f"image-{i:09d}".encode(), row.content)
                if labelled:
                    transaction.put(f"label-{i:09d}".encode(), str(row.label).encode())
    return f"lmdb:{root}"


def _torchvision(root: Path, rows: Sequence[Row], labelled: bool) -> str:
    """DTD, whose splits are lists of files. Its folder is that of downloads."""
    dtd(root, rows)
    return "torchvision:DTD"


Made = Callable[[Path, Sequence[Row], bool], str]
KINDS: dict[str, Made] = {
    "folder": _folder, "csv": _csv, "zip": _zip, "tar": _tar, "webdataset": _webdataset, "parquet": _parquet, "hf": _hugging_face,
    "lmdb": _lmdb, "torchvision": _torchvision,
}  # fmt: skip
"""Kind of source to what writes a set into an empty folder and returns data.source. labelled: False leaves the column of classes out."""
LABELLED_APART = ("csv", "webdataset", "parquet", "hf", "lmdb")
"""The kinds that say classes by a column, a file or a key of their own, which may be missing."""


def made_source(kind: str, root: Path, rows: Sequence[Row] | None = None, labelled: bool = True) -> str:
    """data.source of a set in a new folder `root`. Skips the test where the format's library is not here."""
    root.mkdir()
    return KINDS[kind](root, digit_rows() if rows is None else rows, labelled)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a web server of the files in a folder."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()
