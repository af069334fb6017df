"""The source torchvision:NAME: data sets that torchvision knows, with their own splits. They are downloaded where they are absent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.core import files
from tltrain.core.errors import UserError, first_line
from tltrain.core.paths import cache_root, writable
from tltrain.core.recipe import Data
from tltrain.data.dataset import Source, SourceKind
from tltrain.data.published.pcam import check_reader, of_hdf5
from tltrain.data.sources.arrays import MappedReader, from_arrays
from tltrain.data.sources.image_list import from_files
from tltrain.data.tables.listing import Listed

_HALVES = {"train": {"train": True}, "test": {"train": False}}
_TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_WHOLE: Mapping[str, Mapping[str, Any]] = {"train": {}}


@dataclass(frozen=True)
class Published:
    """A data set of torchvision."""

    splits: Mapping[str, Mapping[str, Any]]
    """Our split to the arguments of torchvision's class that give it. Without val and test they are cut from train."""
    megabytes: int
    """Size of the download, about."""
    url: str
    """Where it is fetched by hand."""
    folder: str
    """Where it lies below the folder of downloads."""


SETS = {
    "Flowers102": Published(_THREE, 350, "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/", "flowers-102"),
    "OxfordIIITPet": Published(
        {"train": {"split": "trainval"}, "test": {"split": "test"}}, 810, "https://www.robots.ox.ac.uk/~vgg/data/pets/", "oxford-iiit-pet"
    ),
    "Food101": Published(_TWO, 5000, "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "food-101"),
    "StanfordCars": Published(_TWO, 1900, "https://ai.stanford.edu/~jkrause/cars/car_dataset.html", "stanford_cars"),
    "DTD": Published(_THREE, 630, "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz", "dtd"),
    "EuroSAT": Published(_WHOLE, 90, "https://huggingface.co/datasets/torchgeo/eurosat", "eurosat"),
    "FGVCAircraft": Published(
        _THREE, 2800, "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", "fgvc-aircraft-2013b"
    ),
    "SUN397": Published(_WHOLE, 39_000, "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz", "SUN397"),
    "Caltech101": Published(_WHOLE, 140, "https://data.caltech.edu/records/mzrjq-6wc02", "caltech101"),
    "STL10": Published(_TWO, 2600, "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", "stl10_binary"),
    "SVHN": Published(_TWO, 250, "http://ufldl.stanford.edu/housenumbers/", "train_32x32.mat and test_32x32.mat"),
    "MNIST": Published(_HALVES, 12, "https://ossci-datasets.s3.amazonaws.com/mnist/", "MNIST/raw"),
    "FashionMNIST": Published(_HALVES, 31, "https://github.com/zalandoresearch/fashion-mnist", "FashionMNIST/raw"),
    "GTSRB": Published(_TWO, 280, "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/", "gtsrb"),
    "Country211": Published(
        {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}},
        11_400, "https://openaipublic.azureedge.net/clip/data/country211.tgz", "country211",
    ),
    "PCAM": Published(_THREE, 7900, "https://zenodo.org/records/2546921", "pcam"),
}  # fmt: skip
"""By torchvision's names. A url is a file, or the page or folder that lists the files."""


def open_torchvision(argument: str | None, spec: Data, root: Path) -> Source:
    """Open a data set in `root`, downloaded if absent. Raises UserError for an unknown name, and where it cannot be had."""
    name = _known_name(argument or "")
    if name == "PCAM":
        check_reader()
    parts = _open_or_download(name, root)
    train = next(iter(parts.values()))
    if name == "PCAM":
        return of_hdf5(parts)
    if hasattr(train, "data") and not hasattr(train, "samples"):
        return _of_arrays(name, parts)
    pairs = {split: _images(part) for split, part in parts.items()}
    names = {split: _classes(part, [label for _, label in pairs[split]]) for split, part in parts.items()}  # each split numbers its own
    listed = [
        Listed(path, path.relative_to(root).as_posix(), split, names[split][label]) for split in parts for path, label in pairs[split]
    ]
    order = tuple(dict.fromkeys(name for split in parts for name in names[split]))
    return from_files(listed, f"torchvision:{name}", spec, (), order=order)


def outline_torchvision(argument: str | None, root: Path) -> Source | None:
    """For `tltrain plan`, which downloads nothing. Raises UserError where the data set is absent."""
    name = _known_name(argument or "")
    try:
        _open_present(name, root)
    except Exception as error:  # as in _open_or_download
        raise UserError(
            f"torchvision:{name} is not in {root} yet, and a plan downloads nothing; training does ({SETS[name].megabytes:,} MB)"
        ) from error
    return None


def _known_name(argument: str) -> str:
    """The name as torchvision writes it. Raises UserError for another one."""
    plain = {_plain(name): name for name in SETS}
    if _plain(argument) in plain:
        return plain[_plain(argument)]
    near = get_close_matches(_plain(argument), plain, n=1)
    hint = f"did you mean torchvision:{plain[near[0]]}?" if near else f"it can be {', '.join(SETS)}"
    raise UserError(f"data.source is torchvision:{argument}; {hint}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _open_present(name: str, root: Path, **options: Any) -> dict[str, Any]:
    """Our split to torchvision's data set. Raises torchvision's errors: RuntimeError for an absent data set, others for damaged files."""
    from torchvision import datasets

    return {split: getattr(datasets, name)(str(root), **arguments, **options) for split, arguments in SETS[name].splits.items()}


def _open_or_download(name: str, root: Path) -> dict[str, Any]:
    """As `_open_present`, after a download if needed. torchvision checks the md5 of its downloads. Raises UserError."""
    try:
        return files.waited(lambda: _open_present(name, root))  # it may take the md5 of gigabytes
    except Exception:  # of files that are absent or damaged it raises RuntimeError, OSError and what its readers raise
        writable(root, "TLTRAIN_DATA")
    known = SETS[name]
    why: object = files.unresolved(known.url)
    if why is None:
        try:
            with files.downloading(root / f".{name}.lock", f"downloads {name}"):  # one process downloads, the others wait
                return files.waited(lambda: _open_present(name, root, download=True))
        except Exception as error:
            why = first_line(error)
    raise UserError(
        f"torchvision:{name} is not whole in {root} and cannot be downloaded ({why}); fetch it from {known.url} (about {known.megabytes:,} "
        f"MB) and put it there as torchvision does, in {known.folder}; or set TLTRAIN_DATA to the folder that holds it"
    )


def _images(part: Any) -> list[tuple[Path, int]]:
    """(file, label) of each image of a data set of files. The names are torchvision's own, which have stood since they came."""
    if hasattr(part, "categories"):  # Caltech101
        folder = Path(part.root) / "101_ObjectCategories"
        paths = [folder / part.categories[label] / f"image_{number:04d}.jpg" for number, label in zip(part.index, part.y, strict=True)]
        return list(zip(paths, part.y, strict=True))
    pairs = getattr(part, "samples", None) or getattr(part, "_samples", None)
    if pairs is None:
        images = part._image_files if hasattr(part, "_image_files") else part._images
        pairs = zip(images, part._labels, strict=True)
    return sorted((Path(path), int(label)) for path, label in pairs)  # SUN397 lists a folder, whose order differs from disk to disk


def _classes(part: Any, labels: list[int]) -> list[str]:
    """The name of each number. GTSRB has none: there the numbers are the names, in the width that their folders have."""
    names = getattr(part, "categories", None) or getattr(part, "classes", None)
    return list(names) if names else [f"{k:05d}" for k in range(max(labels) + 1)]


def _of_arrays(name: str, parts: Mapping[str, Any]) -> Source:
    """A source of images that torchvision holds in memory. They are written to the cache, where all processes of a machine share them."""
    pixels_NHWC = np.concatenate([_pixels(part) for part in parts.values()])
    targets = [np.asarray(part.targets if hasattr(part, "targets") else part.labels).astype(np.int64) for part in parts.values()]
    label_N = np.concatenate(targets)
    digests = tuple(hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in pixels_NHWC)
    content = hashlib.blake2b(repr((pixels_NHWC.shape, digests, label_N.tolist())).encode(), digest_size=16).hexdigest()
    file = cache_root() / f"{name.lower()}-{content}.npy"
    if not file.exists():
        with files.replacing(file) as temporary, temporary.open("wb") as opened:  # np.save adds a suffix to a path, but not to a file
            np.save(opened, pixels_NHWC)
    first = next(iter(parts.values()))
    classes = tuple(getattr(first, "classes", None) or [str(k) for k in range(int(label_N.max()) + 1)])
    declared = [split for split, target in zip(parts, targets, strict=True) for _ in target]
    groups = np.unique(np.array(digests), return_inverse=True)[1]  # images that are equal stay in one split
    return replace(from_arrays(name, classes, label_N, declared, MappedReader(file), content), digests=digests, groups=groups)


def _pixels(part: Any) -> np.ndarray:
    """uint8 (N, H, W, 3). STL10 and SVHN hold (N, 3, H, W), MNIST grey (N, H, W)."""
    data = np.asarray(part.data)
    return np.repeat(data[..., None], 3, axis=3) if data.ndim == 3 else np.ascontiguousarray(data.transpose(0, 2, 3, 1))


TORCHVISION = SourceKind(
    lambda argument, spec, root: open_torchvision(argument, spec, root),
    argument="NAME",
    outline=lambda argument, spec, root: outline_torchvision(argument, root),
)
