"""The sets that `benchmarks.sources` reads: how each format's own library writes and reads it."""

from __future__ import annotations

import csv
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets as sets
from torchvision.transforms import v2

SIDE, RESIZE, SIZE, BATCH, CLASSES = 96, 72, 64, 64, 8
"""Pixels of a picture, of its shorter side once it is resized, and of the crop; images of a batch; classes."""
SHARD = 1000
"""Images of a tar shard, and of a row group."""

Batches = Iterator[tuple[Tensor, Tensor]]
Read = Callable[[int], bytes]
seen_by = v2.Compose([v2.Resize(RESIZE), v2.CenterCrop(SIZE), v2.PILToTensor()])


class Picture(NamedTuple):
    content: bytes
    """A JPEG file."""
    label: int

    @property
    def rgb(self) -> Image.Image:
        return Image.open(io.BytesIO(self.content)).convert("RGB")


def pictures(num: int) -> list[Picture]:
    """Smooth random pictures, no two alike."""
    made = []
    for i in range(num):
        file = io.BytesIO()
        pixels_HWC = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels_HWC).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        made.append(Picture(file.getvalue(), i % CLASSES))
    return made


@dataclass(frozen=True)
class Format:
    """One source of tltrain, and the usual way to train from the same files without it."""

    source: str
    """data.source, with {} for the folder of the set."""
    write: Callable[[Path, Sequence[Picture]], object]
    theirs: Callable[[Path], Callable[[], Batches]]
    """Opens the set of a folder. What it returns gives an epoch of shuffled batches: pixels (B, 3, SIZE, SIZE) uint8, labels (B,)."""
    reader: str
    """What `theirs` reads with, in words."""
    package: str = ""
    """What it needs beyond torchvision, by its name in pip and in Python."""

    def missing(self) -> str:
        """The package that is not here. Empty: all are."""
        return "" if not self.package or find_spec(self.package) else self.package


class _Pictures(Dataset[tuple[Tensor, int]]):
    """Files of images in any container, as the tutorials read them."""

    def __init__(self, read: Read, labels: Sequence[int]) -> None:
        self.read, self.labels = read, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with Image.open(io.BytesIO(self.read(i))) as image:
            return seen_by(image.convert("RGB")), self.labels[i]


def _shuffled(data: Dataset[Any]) -> Callable[[], Batches]:
    return lambda: iter(DataLoader(data, BATCH, shuffle=True))


def _names(given: Sequence[Picture]) -> list[str]:
    return [f"{picture.label}/{i:06}.jpg" for i, picture in enumerate(given)]


def _write_folder(root: Path, given: Sequence[Picture]) -> None:
    for name, picture in zip(_names(given), given, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture.content)


def _write_csv(root: Path, given: Sequence[Picture]) -> None:
    _write_folder(root / "images", given)
    rows = [f"images/{name},{picture.label}\n" for name, picture in zip(_names(given), given, strict=True)]
    (root / "set.csv").write_text("".join(["path,label\n", *rows]))


def _read_csv(root: Path) -> Callable[[], Batches]:
    with (root / "set.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return _shuffled(_Pictures(lambda i: (root / rows[i]["path"]).read_bytes(), [int(row["label"]) for row in rows]))


def _write_zip(root: Path, given: Sequence[Picture]) -> None:
    with zipfile.ZipFile(root / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, picture in zip(_names(given), given, strict=True):
            archive.writestr(name, picture.content)


def _read_zip(root: Path) -> Callable[[], Batches]:
    archive = zipfile.ZipFile(root / "set.zip")
    members = archive.infolist()
    return _shuffled(_Pictures(lambda i: archive.read(members[i]), [int(member.filename[0]) for member in members]))


def _write_tar(root: Path, given: Sequence[Picture]) -> None:
    with tarfile.open(root / "set.tar", "w") as archive:
        for name, picture in zip(_names(given), given, strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(picture.content)
            archive.addfile(member, io.BytesIO(picture.content))


def _read_tar(root: Path) -> Callable[[], Batches]:
    archive = tarfile.open(root / "set.tar")  # noqa: SIM115  # it stays open while the process lives
    members = archive.getmembers()
    return _shuffled(_Pictures(lambda i: archive.extractfile(members[i]).read(), [int(m.name[0]) for m in members]))  # type: ignore[union-attr]


def _write_parquet(root: Path, given: Sequence[Picture]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"image": [picture.content for picture in given], "label": [picture.label for picture in given]})
    pa.parquet.write_table(table, root / "set.parquet", row_group_size=SHARD)


def _read_parquet(root: Path) -> Callable[[], Batches]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(root / "set.parquet")
    column = table["image"].combine_chunks()
    return _shuffled(_Pictures(lambda i: column[i].as_py(), table["label"].to_pylist()))


def _write_hf(root: Path, given: Sequence[Picture]) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(k) for k in range(CLASSES)])})
    images = [{"bytes": picture.content, "path": None} for picture in given]
    columns = {"image": images, "label": [picture.label for picture in given]}
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, features)}).save_to_disk(root / "saved")


def _read_hf(root: Path) -> Callable[[], Batches]:
    import datasets

    def transformed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixels": [seen_by(image.convert("RGB")) for image in rows["image"]], "label": rows["label"]}

    loader = DataLoader(datasets.load_from_disk(root / "saved")["train"].with_transform(transformed), BATCH, shuffle=True)
    return lambda: ((batch["pixels"], batch["label"]) for batch in loader)


def _write_webdataset(root: Path, given: Sequence[Picture]) -> None:
    import webdataset

    with webdataset.ShardWriter(str(root / "set-%04d.tar"), maxcount=SHARD, verbose=0) as writer:
        for i, picture in enumerate(given):
            writer.write({"__key__": f"{i:06}", "jpg": picture.content, "cls": picture.label})


def _read_webdataset(root: Path) -> Callable[[], Batches]:
    import webdataset

    shards = [str(file) for file in sorted(root.glob("set-*.tar"))]
    data = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(SHARD).decode("pil").to_tuple("jpg", "cls").map_tuple(seen_by)
    return lambda: iter(webdataset.WebLoader(data.batched(BATCH), batch_size=None))


def _write_lmdb(root: Path, given: Sequence[Picture]) -> None:
    import lmdb

    with lmdb.open(str(root / "set"), map_size=2**30) as database, database.begin(write=True) as transaction:
        for i, picture in enumerate(given):
            transaction.put(f"image-{i:09}".encode(), picture.content)
            transaction.put(f"label-{i:09}".encode(), str(picture.label).encode())


def _read_lmdb(root: Path) -> Callable[[], Batches]:
    import lmdb

    transaction: Any = lmdb.open(str(root / "set"), readonly=True, lock=False, readahead=False).begin(buffers=False)
    num = transaction.stat()["entries"] // 2
    labels = [int(transaction.get(f"label-{i:09}".encode())) for i in range(num)]
    return _shuffled(_Pictures(lambda i: transaction.get(f"image-{i:09}".encode()), labels))


def _write_pcam(root: Path, given: Sequence[Picture]) -> None:
    import h5py

    (root / "pcam").mkdir()
    for split, part in (("train", given), ("valid", given[:CLASSES]), ("test", given[:CLASSES])):
        arrays = {"x": np.stack([np.asarray(picture.rgb) for picture in part]), "y": np.array([p.label % 2 for p in part], np.uint8)}
        for kind, values in arrays.items():
            with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_{split}_{kind}.h5", "w") as file:
                values = values if kind == "x" else values[:, None, None, None]
                file.create_dataset(kind, data=values, compression="gzip", chunks=(1, *values.shape[1:]))


FORMATS = {
    "folder": Format(
        "folder:{}/set", lambda root, given: _write_folder(root / "set", given),
        lambda root: _shuffled(sets.ImageFolder(str(root / "set"), seen_by)), "torchvision ImageFolder",
    ),
    "csv": Format("csv:{}/set.csv", _write_csv, _read_csv, "Python's csv, Pillow"),
    "zip": Format("zip:{}/set.zip", _write_zip, _read_zip, "Python's zipfile, Pillow"),
    "tar": Format("tar:{}/set.tar", _write_tar, _read_tar, "Python's tarfile, Pillow"),
    "parquet": Format("parquet:{}/set.parquet", _write_parquet, _read_parquet, "pyarrow, all in memory; Pillow", "pyarrow"),
    "hf": Format("hf:{}/saved", _write_hf, _read_hf, "datasets", "datasets"),
    "webdataset": Format("webdataset:{}/set-*.tar", _write_webdataset, _read_webdataset, "webdataset", "webdataset"),
    "lmdb": Format("lmdb:{}/set", _write_lmdb, _read_lmdb, "lmdb, Pillow", "lmdb"),
    "torchvision:EuroSAT": Format(
        "torchvision:EuroSAT", lambda root, given: _write_folder(root / "eurosat" / "2750", given),
        lambda root: _shuffled(sets.EuroSAT(str(root), transform=seen_by)), "torchvision EuroSAT",
    ),
    "torchvision:PCAM": Format(
        "torchvision:PCAM", _write_pcam,
        lambda root: _shuffled(sets.PCAM(str(root), "train", transform=seen_by)), "torchvision PCAM", "h5py",
    ),
}  # fmt: skip
