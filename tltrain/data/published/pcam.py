"""The images of PatchCamelyon, which lie in files of HDF5: copied once to the cache, where all processes of a machine share them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.core import files
from tltrain.core.errors import UserError, first_line
from tltrain.core.output.progress import Pace
from tltrain.core.paths import cache_root
from tltrain.data.dataset import Source
from tltrain.data.sources.arrays import MappedReader, from_arrays

ROWS = 1024
"""Images that are copied at a time; they take 28 MB."""
CLASSES = ("no tumor tissue", "tumor tissue")

_log = logging.getLogger(__name__)


def check_reader() -> None:
    """Raise UserError where files of HDF5 cannot be read."""
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise UserError(f"torchvision:PCAM lies in files of HDF5, which h5py reads; it is not here ({error}): "
                        "pip install 'tltrain[pcam]'") from error  # fmt: skip


def of_hdf5(parts: Mapping[str, Any]) -> Source:
    """The source of torchvision's data sets, by our splits. Raises UserError for a file that is cut or damaged."""
    pairs = {
        split: [part._base_folder / part._FILES[part._split][kind][0] for kind in ("images", "targets")] for split, part in parts.items()
    }
    stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for pair in pairs.values() for file in pair]
    copy = cache_root() / "packs" / f"pcam-{hashlib.blake2b(json.dumps(stamps).encode(), digest_size=8).hexdigest()}.npy"
    copy.parent.mkdir(exist_ok=True)
    with files.locked(Path(f"{copy}.lock"), "copies PCAM out of its files"):
        known = _load(copy)
        if known is None:
            known = _copied(pairs, copy)
            files.write_json(copy.with_suffix(".json"), known)
    label_N, digests = np.array(known["labels"], np.int64), tuple(known["digests"])
    content = hashlib.blake2b(repr((digests, known["labels"])).encode(), digest_size=16).hexdigest()
    groups = np.unique(np.array(digests), return_inverse=True)[1]  # images that are equal stay in one split
    source = from_arrays("PCAM", CLASSES, label_N, known["splits"], MappedReader(copy), content)
    return replace(source, digests=digests, groups=groups)


def _copied(pairs: Mapping[str, list[Path]], copy: Path) -> dict[str, list[Any]]:
    """Write the pixels (N, 96, 96, 3) of all splits. Returns the label, the split and a hash of each image."""
    import h5py

    known: dict[str, list[Any]] = {"labels": [], "splits": [], "digests": []}
    shapes = {split: _shape(images) for split, (images, _) in pairs.items()}
    pace = Pace("images of PCAM copied", sum(shape[0] for shape in shapes.values()))
    with files.replacing(copy) as temporary:
        pixels_NHWC = np.lib.format.open_memmap(temporary, "w+", np.uint8, (pace.total, *next(iter(shapes.values()))[1:]))
        for split, (images, targets) in pairs.items():
            try:
                with h5py.File(images) as image_file, h5py.File(targets) as target_file:
                    label_N = target_file["y"][:].reshape(-1)
                    if len(label_N) != shapes[split][0]:
                        raise UserError(f"{targets} has {len(label_N):,} classes for {shapes[split][0]:,} images; download it again")
                    for first in range(0, len(label_N), ROWS):
                        part_NHWC = image_file["x"][first : first + ROWS]
                        pixels_NHWC[pace.done : pace.done + len(part_NHWC)] = part_NHWC
                        known["digests"] += [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in part_NHWC]
                        pace.advance(len(part_NHWC))
            except (OSError, KeyError, ValueError) as error:
                raise _damaged(error, images) from error
            known["labels"] += label_N.astype(int).tolist()
            known["splits"] += [split] * len(label_N)
        pixels_NHWC.flush()
    return known


def _shape(images: Path) -> tuple[int, ...]:
    import h5py

    try:
        with h5py.File(images) as file:
            return tuple(file["x"].shape)
    except (OSError, KeyError) as error:
        raise _damaged(error, images) from error


def _damaged(error: Exception, file: Path) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"{file} or the file of its classes is not whole: {first_line(error)}; delete it, and start again, which downloads it")


def _load(copy: Path) -> dict[str, list[Any]] | None:
    """The record of a copy. None if there is none, or if the copy was truncated since."""
    try:
        known = json.loads(copy.with_suffix(".json").read_text(encoding="utf-8"))
        is_whole = len(known["labels"]) == len(known["splits"]) == len(known["digests"]) == len(np.load(copy, mmap_mode="r"))
        return dict(known) if is_whole else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        _log.warning("%s is damaged; PCAM is copied out of its files again", copy)
        return None
