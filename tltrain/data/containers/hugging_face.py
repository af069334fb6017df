"""The source hf:NAME[:CONFIG] or hf:PATH: a data set of Hugging Face, from the hub or from a folder that `save_to_disk` wrote.

The library brings it here as Arrow files, in which images lie as they are: they are read from there by their places.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.core.errors import UserError, first_line, some
from tltrain.core.files import unresolved, waited
from tltrain.core.output import progress
from tltrain.core.paths import absolute
from tltrain.core.recipe import Data
from tltrain.data.containers.columns import find_columns
from tltrain.data.containers.contents import Contents, Extent, cached_contents
from tltrain.data.containers.packed import Packed, from_packed, numbers_first
from tltrain.data.containers.parquet import arrow, class_notes, entries, untold
from tltrain.data.dataset import Source, SourceKind
from tltrain.data.sources.layout import split_of
from tltrain.data.tables.listing import Listed

SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder of `save_to_disk` is known: several splits, or one."""
HUB = "https://huggingface.co"


def open_hf(argument: str | None, spec: Data) -> Source:
    """Open a data set of Hugging Face with its own splits. Raises UserError where it cannot be had, and for missing columns."""
    arrow()
    splits, notes = _splits(_opened(argument or ""), f"data.source is hf:{argument}")
    what = f"arrow|{spec.image_column}|{spec.label_column}"
    images: list[Packed] = []
    tables: list[Contents] = []
    for name, (split, data) in splits.items():
        first = 0
        for file in _files(data, f"hf:{argument}"):
            table = cached_contents(file, what, lambda file: _look_through(file, spec))
            images += [Packed(_listed(e, file, name, split, first), table.file, e, table.stamp) for e in table.images]
            first += table.rows
            tables.append(table)
        if first != len(data):
            raise UserError(
                f"data.source is hf:{argument}; split {name} is a part of its files; save it with save_to_disk, and give that folder"
            )
    order = tables[0].classes or numbers_first([image.listed.label for image in images])
    notes += class_notes(tables)
    return from_packed(images, f"hf:{argument}", spec, notes, order)


def _opened(argument: str) -> dict[str, Any]:
    """Split to Dataset. Raises UserError."""
    if not argument:
        raise UserError("data.source is hf:; give a name on the hub, hf:OWNER/NAME, or a folder that `save_to_disk` wrote, hf:PATH")
    path = absolute(argument)
    if argument.startswith(("/", "./", "../", "~")) and not path.exists():
        raise UserError(f"data.source is hf:{argument}; {path} is not there; give the folder that `save_to_disk` wrote")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.source is hf:{argument}, which needs the library datasets ({error}): pip install 'tltrain[hf-datasets]'"
        ) from error
    try:
        if path.is_dir():
            is_saved = any((path / name).is_file() for name in SAVED)
            load = datasets.load_from_disk if is_saved else partial(datasets.load_dataset, keep_in_memory=False)
            opened = waited(partial(load, str(path)))
        else:
            name, _, config = argument.partition(":")
            with _offline(datasets):
                opened = waited(partial(datasets.load_dataset, name, config or None, keep_in_memory=False))
    except Exception as error:  # what it raises has no common base: of the network, of the hub, of a builder
        raise UserError(
            f"data.source is hf:{argument}, which cannot be opened: {first_line(error).rstrip('.:')}; {_remedy(argument)}"
        ) from error
    return dict(opened) if isinstance(opened, dict) else {str(opened.split or "train"): opened}


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Inside, without a network, the library looks at what is here alone. It would ask for half a minute first."""
    from huggingface_hub import constants

    if unresolved(HUB) is None:
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _remedy(argument: str) -> str:
    if (path := absolute(argument)).is_dir():
        if (cut := next(filter(_is_cut, sorted(path.rglob("*.arrow"))), None)) is not None:
            return f"{cut} is not a whole Arrow file; copy or save the data set again"
        return "give a folder that `save_to_disk` wrote, or Parquet files as parquet:GLOB"
    if (why := unresolved(HUB)) is not None:
        return f"{why} Download it where there is one, and give the folder that `save_to_disk` writes as hf:PATH"
    return "its name is as on the hub, such as hf:OWNER/NAME or hf:OWNER/NAME:CONFIG"


def _is_cut(file: Path) -> bool:
    pa = arrow()
    try:
        with pa.memory_map(str(file)) as mapped:
            pa.ipc.open_stream(mapped).read_all()
    except (pa.ArrowException, OSError):
        return True
    return False


def _splits(opened: dict[str, Any], whole: str) -> tuple[dict[str, tuple[str, Any]], tuple[str, ...]]:
    """(name of a split there to (train, val or test; Dataset), notes). A data set of one split is train."""
    if len(opened) == 1:
        name = next(iter(opened))
        note = () if split_of(name) == "train" else (f"the only split, {name}, is taken as train",)
        return {name: ("train", opened[name])}, note
    known = {name: (split, data) for name, data in opened.items() if (split := split_of(name))}
    kinds = [split for split, _ in known.values()]
    if "train" not in kinds:
        raise UserError(f"{whole}; its splits are {some(list(opened))}, and none is train")
    if len(set(kinds)) < len(kinds):
        raise UserError(f"{whole}; of its splits {some(list(opened))} two mean the same")
    rest = [name for name in opened if name not in known]
    return known, ((f"splits that are not used: {some(rest)}",) if rest else ())


def _files(data: Any, whole: str) -> list[Path]:
    """The Arrow files of a Dataset, which hold its rows in their order. Raises UserError for one in memory."""
    if getattr(data, "_indices", None) is not None:  # rows that were chosen or shuffled before it was saved
        data = data.flatten_indices()
    files = [Path(entry["filename"]).absolute() for entry in data.cache_files]
    if not files:
        raise UserError(f"{whole} has no rows here, or holds them in memory; save it with save_to_disk, and give that folder")
    return files


def _listed(extent: Extent, file: Path, name: str, split: str, first: int) -> Listed:
    """An image under the name SPLIT/ROW. Its row is counted over all files of the split."""
    path = Path(extent.path) if extent.path else file / extent.name
    return Listed(path, f"{name}/{first + int(extent.name)}", extent.split or split, extent.label, extent.group)


def _look_through(file: Path, spec: Data) -> Contents:
    pa = arrow()
    try:
        with file.open("rb") as opened:
            whole = pa.py_buffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        return _places(pa.ipc.open_stream(pa.BufferReader(whole)), whole.address, whole.size, file, spec)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file} is not a whole Arrow file: {first_line(error).rstrip('.:')}; copy or download the data set again"
        ) from error


def _places(reader: Any, address: int, size: int, file: Path, spec: Data) -> Contents:
    """Where each image lies in a mapped Arrow file that begins at this address of the memory."""
    columns = find_columns(reader.schema, spec, str(file))
    images: list[Extent] = []
    rows = 0
    for batch in reader:
        pictures = batch.column(columns.image)
        start_N, length_N = _spans(pictures, address, size, file)
        values = batch.select([name for name in columns.names() if name != columns.image]).to_pylist()
        for row, said in entries(values, columns, str(file), rows):
            start, length = int(start_N[row - rows]), int(length_N[row - rows])
            apart = "" if length else _path(pictures[row - rows].as_py())
            images.append(said._replace(start=start, length=length, path=apart))
        rows += len(values)
        progress.report(f"{file.name}: {rows:,} rows looked through")
    return Contents(file, tuple(images), untold(rows - len(images), file.name), columns.classes, rows)


def _spans(pictures: Any, address: int, size: int, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(first byte in the file, number of bytes), each (N,), of a column of images. Raises UserError for those that are compressed."""
    if str(pictures.type).startswith("struct<"):
        pictures = pictures.field("bytes")
    _, offsets, data = pictures.buffers()
    if not len(pictures) or data is None or not data.size:
        return np.zeros(len(pictures), np.int64), np.zeros(len(pictures), np.int64)
    kind = {"binary": np.int32, "large_binary": np.int64}.get(str(pictures.type))
    if kind is None or not (address <= data.address and data.address + data.size <= address + size):
        raise UserError(f"{file} holds its images compressed or in parts; save the data set anew with save_to_disk")
    place_N = np.frombuffer(offsets, kind)[pictures.offset : pictures.offset + len(pictures) + 1].astype(np.int64)
    return data.address - address + place_N[:-1], np.diff(place_N)


def _path(value: Any) -> str:
    """The file that an image without bytes names. Empty: none that is here, and the image is then unreadable."""
    path = value.get("path") if isinstance(value, dict) else None
    return str(path) if path and Path(path).is_file() else ""


HF = SourceKind(lambda argument, spec, root: open_hf(argument, spec), argument="NAME", columns=True)
